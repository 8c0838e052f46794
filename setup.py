"""Packaging. `kernels/` is reached through the symlink `tokenkit/kernels`: docs/architecture.md says why."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

EXTRAS = {
    "train": [
        "transformers>=5.3",
        "tokenizers>=0.21",
        "safetensors",
        "peft>=0.15",
        "datasets>=3",
        "numpy",
        "tyro>=0.9",
        "omegaconf>=2.3",
        "PyYAML",
        "rapidfuzz>=3.9",
        "regex",
        "rich",
        "tqdm",
        "matplotlib",
    ],
    "track": ["wandb", "tensorboard"],
    "eval": ["lm_eval>=0.4.9"],
    "export": ["onnx", "onnxscript", "onnxruntime", "gguf"],
    "quantize": ["torchao>=0.17"],  # not among those of tests: it slows every import of peft
    "flash": ["flash-attn"],
    # mkdocs 2 is another program: no plugins
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.7", "mkdocstrings-python>=2", "ruff"],
    "dev": [
        "pytest",
        "pytest-benchmark",
        "pytest-xdist",
        "hypothesis",
        "trl",
        "lightning",
        "liger-kernel",
        "sentencepiece",
        "protobuf",
        "ruff",
        "mypy",
        "types-PyYAML",
    ],
}

setup(
    name="tokenkit-torch",  # the index has another project called tokenkit
    version="0.1.0",
    description="Move language models across tokenizers: fused distillation in PyTorch and Triton",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    keywords=[
        "tokenizer transfer",
        "cross-tokenizer distillation",
        "fused linear cross-entropy",
        "knowledge distillation",
        "language models",
        "triton",
    ],
    project_urls={
        "Approximate likelihood matching (paper)": "https://arxiv.org/abs/2503.20083",
        "Zero-shot tokenizer transfer (paper)": "https://arxiv.org/abs/2405.07883",
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Text Processing :: Linguistic",
        "Typing :: Typed",
    ],
    packages=find_namespace_packages(include=["tokenkit*"]),
    package_data={"tokenkit": ["py.typed"], "": ["*.yaml"]},
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["tokenkit=tokenkit.cli:main"]},
)
