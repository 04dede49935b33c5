"""bertgpt inside other libraries' models."""
