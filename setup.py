"""Packages Megatron Mosaic; the exact versions that tests run with are in requirements.lock."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
DATA_FILES = ["py.typed", "**/*.yaml", "**/*.json", "**/*.csv", "**/*.html", "**/*.css", "**/*.js"]


def read_version() -> str:
    """Reads `__version__` as text: importing the package would need its dependencies."""
    source = (ROOT / "megatron_mosaic" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, flags=re.MULTILINE)
    assert found, "megatron_mosaic/__init__.py defines no __version__"
    return found.group(1)


setup(
    name="megatron-mosaic",
    version=read_version(),
    description="Trains multimodal models under Megatron-LM, every module with its own layout",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="Megatron Mosaic contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[
        *find_packages(include=["megatron_mosaic", "megatron_mosaic.*"]),
        "megatron_mosaic.patches",
    ],
    package_dir={"megatron_mosaic.patches": "patches"},
    package_data={
        "megatron_mosaic": DATA_FILES,
        "megatron_mosaic.patches": ["*/series", "*/*.patch"],
    },
    python_requires=">=3.12",
    install_requires=[
        "torch",
        "megatron-core>=0.19.2,<0.21",
        "numpy",
        "scipy",
        "PyYAML",
        "matplotlib",
        "rich",
        # Megatron's torch_dist checkpoint writer imports it, and its wheel does not ask for it.
        "psutil",
    ],
    extras_require={
        # For recipes; Bridge imports Transformer Engine, which is built for a GPU.
        "bridge": ["megatron-bridge>=0.6.2,<0.7", "nemo-run"],
        "energon": ["megatron-energon"],
        "gpu": ["transformer-engine[core_cu13,pytorch]"],
        "dev": [
            "hypothesis",
            "megatron-energon",
            # Proves how good the assignment of tokens is.
            "ortools",
            "pre-commit",
            # With the extra, node comes as a wheel: nothing is downloaded when it first runs.
            "pyright[nodejs]",
            "pytest",
            "pytest-xdist",
            "ruff",
            "scikit-learn",
            # `pip install --no-build-isolation` builds with what is installed.
            "setuptools>=77",
        ],
    },
    entry_points={"console_scripts": ["megatron-mosaic = megatron_mosaic.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
