"""Packaging of hf_moecal. Tested versions are pinned in constraints.txt; the ranges here say what is known to work.

The lower bounds are tested as constraints-floor.txt, the highest versions as they resolve; transformers, whose models
this package reaches into, has an upper bound until its next release is verified (hf_moecal/versions.py).
"""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "hf_moecal" / "__init__.py").read_text(), re.M).group(1)

EXTRAS = {
    "peft": ["peft>=0.18"],
    "gguf": ["gguf>=0.10"],
    "lint": ["ruff>=0.9"],
    "space": ["gradio>=5", "playwright>=1.40"],
    "trl": ["trl>=1.16,<2"],
}
EXTRAS["test"] = [*EXTRAS["peft"], *EXTRAS["gguf"], *EXTRAS["trl"]]
EXTRAS["test"] += [
    "hypothesis>=6.100",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.5",
    "prometheus_client>=0.20",
    "netcal>=1.3",
    "relplot>=1.0",
    "torchmetrics>=1.4",
    "uncertainty-calibration>=0.1.4",
]
EXTRAS["dev"] = [*EXTRAS["test"], *EXTRAS["lint"]]

setup(
    name="hf_moecal",
    version=VERSION,
    description=(
        "Confidence calibration for sparse Mixture-of-Experts language models: train, measure, recalibrate and "
        "monitor Hugging Face checkpoints so that their probabilities can be trusted under distribution shift."
    ),
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["hf_moecal", "hf_moecal.*"]),
    package_data={"hf_moecal": ["py.typed", "metrics/ece/*"]},
    install_requires=[
        "accelerate>=1.10",
        "datasets>=4.0",
        "evaluate>=0.4.5",
        "huggingface_hub>=1.5",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pyarrow>=15",
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "torch>=2.6",
        "tqdm>=4.66.3",
        "transformers>=5.6.2,<5.25",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["moecal = hf_moecal.cli.commands:main"]},
    keywords="mixture-of-experts calibration confidence uncertainty distribution-shift transformers",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
