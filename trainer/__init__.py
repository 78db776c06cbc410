"""Fine-tune language models that do not fit the GPU, with DeepSpeed ZeRO-3 and offload to CPU and NVMe."""

__version__ = "0.1.0"
