"""Fine-tune language models that do not fit the GPU: DeepSpeed ZeRO-3, offload to CPU and NVMe."""

from pathlib import Path

__version__ = "0.1.0"
ROOT = Path(__file__).resolve().parent.parent  # holds deepspeed_configs/ and launch/
