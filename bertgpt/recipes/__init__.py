"""Recipes: training runs on real data, built on `accelerate`. See docs/training.md."""
