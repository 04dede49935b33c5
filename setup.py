"""Maps the repository's folders onto the installed package; everything else is in pyproject.toml.

`kernels/` is installed as `bertgpt.kernels`: a top-level package of that name would shadow
Hugging Face's `kernels`, which transformers imports.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["bertgpt", "bertgpt.*"]), "bertgpt.kernels"],
    package_dir={"bertgpt": "bertgpt", "bertgpt.kernels": "kernels"},
)
