"""What a run is on."""

import pytest

from trainer.config.device import uses_gpu
from trainer.config.settings import resolve
from trainer.errors import RunError
from trainer.system import hardware


@pytest.mark.parametrize(
    "flags, words", [([], "no GPU was passed through"), (["--use_cpu", "true"], "--use_cpu")]
)
def test_the_image_for_gpus_without_one(monkeypatch, flags, words):
    """Its ops are CUDA's: a run on the CPU would want a compiler.

    The fix is a flag of docker, or the other image.
    """
    monkeypatch.setenv("ZERO_OFFLOAD_IMAGE", "cuda")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(hardware, "gpu_count", lambda: 0)
    with pytest.raises(RunError, match=words) as error:
        uses_gpu(resolve(flags))
    assert "--gpus all" in str(error.value) and error.value.code == 3
    monkeypatch.setattr(hardware, "gpu_count", lambda: 1)
    if not flags:
        assert uses_gpu(resolve(flags))
