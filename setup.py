"""Packages and dependency ranges. Exact versions that were tested together: constraints.txt."""

from setuptools import find_packages, setup

REQUIRES = [
    "torch>=2.7",
    "deepspeed==0.19.8",
    "transformers>=5.17,<6",
    "accelerate>=1.10",
    "datasets>=4.0",
    "peft>=0.19",
    "safetensors>=0.5",
    "hjson>=3.1",
    "wandb>=0.20",
    "pyyaml>=6.0",
    "tqdm>=4.66",
    "filelock>=3.13",
    "aiohttp>=3.10",  # https:// data, through fsspec
    "s3fs>=2025.1",  # s3:// data
    "gcsfs>=2025.1",  # gs:// data
    "psutil>=5.9",
    "xxhash>=3.4",  # hashes of checkpoint files
    "nvidia-ml-py>=12.535",
    "gguf>=0.17",  # converts the embedded default model
    "ninja>=1.11",  # builds DeepSpeed's ops
    "matplotlib>=3.8",
]

setup(
    name="zero-offload-trainer",
    version="0.1.0",
    description="Fine-tune language models that do not fit the GPU, with DeepSpeed ZeRO-3 and offload to CPU and NVMe",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["trainer*", "data"]),
    package_data={"data": ["samples/*", "templates/*"], "trainer.engine": ["adam.c"]},
    install_requires=REQUIRES,
    extras_require={
        "gpu": [
            "liger-kernel>=0.8,<0.9"
        ],  # Triton kernels: norms, rotary embedding, gated MLP, loss
        "notebook": ["jupyterlab>=4", "ipykernel>=6", "nbclient>=0.10"],  # launch/notebooks/
        "test": [
            "pytest>=8",
            "ruff>=0.9",
            "moto>=5",
            "flask>=3",
            "flask-cors>=4",
            "tiktoken>=0.9",
            "nbclient>=0.10",
            "ipykernel>=6",
        ],
    },
)
