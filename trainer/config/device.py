"""Which device and precision a run uses. Does not import torch."""

import os

from trainer.config.ds_config import DeepSpeedConfig
from trainer.config.settings import Settings
from trainer.errors import DOES_NOT_FIT, RunError
from trainer.system import hardware

PASS_GPUS = (
    "docker run --gpus all (podman: --device nvidia.com/gpu=all), or the image of "
    "make docker-build TARGET=cpu"
)
MANY = 16  # micro-batches, from which a sum in 16 bits is not good enough
NO_FP8 = "bf16, fp16 or fp32: ZeRO-3 offload keeps its parameters in one of these"


def uses_gpu(settings: Settings) -> bool:
    """Return whether the run is on CUDA. Raises RunError where it was asked for and is missing."""
    on_cpu = settings.use_cpu or os.environ.get("DS_ACCELERATOR") == "cpu"
    count = 0 if on_cpu else hardware.gpu_count()
    if hardware.container() == "cuda" and not count:  # its ops are CUDA's, and it has no compiler
        raise RunError(
            "this is the image for GPUs",
            found="--use_cpu, or DS_ACCELERATOR=cpu" if on_cpu else "no GPU was passed through",
            needed="an NVIDIA GPU",
            fix=PASS_GPUS,
            code=DOES_NOT_FIT,
        )
    if on_cpu or count:
        return count > 0
    asked = {
        "--use_cpu false": settings.given("use_cpu"),
        "DS_ACCELERATOR=cuda": os.environ.get("DS_ACCELERATOR") == "cuda",
        "--tf32 true": settings.tf32,
    }
    if flag := next((flag for flag, given in asked.items() if given), None):
        raise RunError(
            f"CUDA was asked for ({flag}) and there is none",
            found="no NVIDIA GPU that this process may use",
            fix="nvidia-smi shows what the driver sees, CUDA_VISIBLE_DEVICES what is hidden; "
            "or run on the CPU",
        )
    return False


def choose_precision(settings: Settings, config: DeepSpeedConfig, gpu: bool) -> tuple[str, str]:
    """Return (bf16, fp16 or fp32, the reason), and write the choice into the configuration.

    Raises RunError where two precisions were asked for, or one that the hardware lacks.
    """
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8":
        raise RunError(
            "fp8 is not supported", found="ACCELERATE_MIXED_PRECISION=fp8", needed=NO_FP8
        )
    asked, switched_off = {}, {}
    if settings.precision != "auto":
        asked[f"--precision {settings.precision}"] = settings.precision
    for name in ("bf16", "fp16"):
        if settings.values[name]:
            asked[f"--{name}"] = name
        enabled = config.values.get(name, {}).get("enabled")
        if enabled is True:
            asked[f"{config.where}: {name}.enabled"] = name
        elif enabled is False:
            switched_off[name] = f"{config.where}: {name}.enabled is false"
    if len(set(asked.values())) > 1:
        raise RunError(
            "two precisions were asked for", found=", ".join(asked), needed="one of them"
        )
    if asked:
        reason, precision = next(iter(asked.items()))
        if precision in switched_off:
            raise RunError(
                f"{precision} was asked for and is switched off",
                found=f"{reason}; {switched_off[precision]}",
                fix='"enabled": "auto"',
            )
    elif settings.given("bf16") or settings.given("fp16"):
        precision, reason = "fp32", "bf16 or fp16 was switched off"
    else:
        precision, reason = _best_precision(gpu)
        if precision in switched_off:
            precision, reason = "fp32", switched_off[precision]
    if precision == "fp16" and not gpu:
        raise RunError("fp16 needs a GPU", found=reason, needed="--precision auto, bf16 or fp32")
    if precision == "bf16" and gpu and not hardware.gpu_has_bf16():
        raise RunError(
            "the GPU has no bf16",
            found=reason,
            needed="--precision auto or fp16; bf16 came with Ampere",
        )
    config.set_precision(precision)
    return precision, reason


def choose_grad_accum_dtype(
    asked: str | None, precision: str, method: str, accumulation: int
) -> str:
    """Return the type in which gradients are added over micro-batches: fp32, or the precision.

    asked: --grad_accum_dtype; None: fp32 where it costs next to nothing (adapters), or where there
    are many micro-batches. Raises RunError for a type that is neither of the two.
    """
    if asked not in (None, "fp32", precision):
        raise RunError(
            "--grad_accum_dtype is neither fp32 nor the run's precision",
            found=f"{asked}, in a run in {precision}",
            needed=f"fp32 or {precision}",
            fix="leave it out, of the JSON's data_types too",
        )
    if asked is None and accumulation >= (2 if method == "lora" else MANY):
        return "fp32"
    return asked or precision


def _best_precision(gpu: bool) -> tuple[str, str]:
    if gpu:
        if hardware.gpu_has_bf16():
            return "bf16", "the GPU has it"
        return "fp16", "the GPU has no bf16"
    if hardware.cpu_has_bf16():
        return "bf16", "the CPU has AVX-512-BF16 or AMX"
    return "fp32", "the CPU would emulate bf16"
