"""Maps the repository's folders onto the installed package; everything else is in pyproject.toml.

`kernels/` is installed as `bertgpt.kernels`: a top-level package of that name would shadow
Hugging Face's `kernels`, which transformers imports. `benchmarks/` is installed as
`bertgpt.benchmarks`, for `bertgpt bench`.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["bertgpt", "bertgpt.*"]),
        "bertgpt.benchmarks",
        "bertgpt.kernels",
    ],
    package_dir={
        "bertgpt": "bertgpt",
        "bertgpt.benchmarks": "benchmarks",
        "bertgpt.kernels": "kernels",
    },
)
