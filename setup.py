"""Packages and dependency ranges. Exact versions that were tested together: constraints.txt."""

from setuptools import find_packages, setup

REQUIRES = [
    "torch>=2.7",
    "deepspeed==0.19.8",  # trainer/engine extends the inside of this version
    "transformers>=5.17,<6",
    "accelerate>=1.10",
    "peft>=0.19",
    "safetensors>=0.5",
    "tokenizers>=0.22",
    "huggingface-hub>=1.0",
    "numpy>=1.26",
    "pyarrow>=17",  # Parquet and Arrow rows
    "datasets>=4",  # rows of the hub, and the splits that a README.md gives
    "fsspec>=2025.1",  # rows at an address
    "aiohttp>=3.10",  # https://, through fsspec
    "s3fs>=2025.1",  # s3://
    "gcsfs>=2025.1",  # gs://
    "hjson>=3.1",
    "jinja2>=3.1.6",  # what a chat template reads
    "pyyaml>=6.0",
    "wandb>=0.20",
    "tqdm>=4.66",
    "psutil>=5.9",
    "xxhash>=3.4",  # hashes of checkpoint files
    "nvidia-ml-py>=12.535",
    "gguf>=0.17",  # converts the default model
    "ninja>=1.11",  # builds DeepSpeed's ops
]
EXTRAS = {
    # Norms, rotary embedding, gated MLP and loss; and the optimizer step: torch brings Triton.
    "gpu": ["liger-kernel>=0.8.5,<0.9", "triton>=3.2"],
    "plot": ["matplotlib>=3.8"],  # launch/plan.py --plot
    "notebook": ["jupyterlab>=4", "ipykernel>=6", "nbclient>=0.10", "matplotlib>=3.8", "pandas>=2"],
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff>=0.9",
        "pyright[nodejs]>=1.1.400",
        "moto>=5",
        "flask>=3",
        "flask-cors>=4",
        "tiktoken>=0.9",
        "nbclient>=0.10",
        "ipykernel>=6",
        "matplotlib>=3.8",
        "pandas>=2",
        # Compiles the GPU's kernels, and interprets them, without a GPU.
        "triton>=3.2; sys_platform == 'linux'",
    ],
}

setup(
    name="zero-offload-trainer",
    version="0.1.0",
    description="Fine-tune language models that do not fit the GPU, with DeepSpeed ZeRO-3 and "
    "offload to CPU and NVMe",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    # deepspeed_configs and launch hold files that the product reads: ROOT of trainer/__init__.py.
    packages=[*find_packages(include=["trainer*", "data"]), "deepspeed_configs", "launch"],
    package_data={
        "data": ["samples/*", "templates/*"],
        "trainer.engine": ["adam.c"],
        "deepspeed_configs": ["*.json"],
        "launch": ["recipes/*.yaml"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
