"""Packaging. Nothing is compiled here: the sources under `kernels/` travel as data. The virtual
GPU and the update kernels are built from them on first use.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
KERNELS = ROOT / "kernels"
SOURCES = ("*.cpp", "*.h", "*.py", "*.md")


def kernel_packages() -> dict[str, str]:
    """Name of each package of sources -> its folder; ``kernels/x`` is ``harmony._kernels.x``."""
    folders = [KERNELS, *sorted(p for p in KERNELS.rglob("*") if p.is_dir())]
    folders = [folder for folder in folders if folder.name != "__pycache__"]
    names = [".".join(("harmony", "_kernels", *f.relative_to(KERNELS).parts)) for f in folders]
    return {
        name: folder.relative_to(ROOT).as_posix()
        for name, folder in zip(names, folders, strict=True)
    }


def version() -> str:
    """The version that the package itself states."""
    text = (ROOT / "harmony" / "core" / "version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert match is not None
    return match[1]


kernels = kernel_packages()

setup(
    name="harmony-train",  # harmony belongs to another project; the import stays harmony
    version=version(),
    description="Train PyTorch models larger than the memory of all GPUs of one server, exactly",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["pytorch", "training", "offloading", "gpu memory", "pipeline parallelism", "llm"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=[*find_packages(include=["harmony", "harmony.*"]), *kernels],
    package_dir=kernels,
    package_data={
        "harmony": ["py.typed"],
        "harmony.report": ["*.html"],
        **{name: list(SOURCES) for name in kernels},
    },
    python_requires=">=3.10",
    install_requires=[
        "isal; platform_machine in 'x86_64 AMD64 aarch64 arm64'",  # CRC-32s; zlib elsewhere
        "torch>=2.10",  # 2.9 has no torch.accelerator.get_memory_info; 2.13 is what is tested
        "networkx>=3",
        "nvidia-ml-py",
        "psutil",
        "rich",
        "tomli; python_version < '3.11'",
    ],
    extras_require={
        "test": [
            "accelerate",
            "diffusers",
            "expecttest",
            "hypothesis",
            "lightning",
            "numpy",
            "peft",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "scikit-learn",
            "tensorboard",
            "transformers",
            "trl",
        ],
        "hf": ["accelerate", "transformers"],
        "lightning": ["lightning"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material", "mkdocstrings[python]"],
        "dev": ["coverage", "mypy", "pre-commit", "ruff", "types-networkx", "types-psutil"],
    },
    entry_points={"console_scripts": ["harmony-run = harmony.cli.main:main"]},
)
