"""CPU cores for each rank, and what a run is on."""

import pytest

from trainer.config.device import uses_gpu
from trainer.config.settings import resolve
from trainer.errors import RunError
from trainer.system import hardware
from trainer.system.hardware import share_cores


def hyperthreads(count):
    """CPU i and CPU i + count/2 are one core, as Linux numbers them."""
    return lambda cpu: {cpu % (count // 2), cpu % (count // 2) + count // 2}


def test_whole_cores_and_nothing_twice():
    shares = share_cores(set(range(8)), [set(), set()], hyperthreads(8))
    assert shares == [{0, 1, 4, 5}, {2, 3, 6, 7}]


def test_near_the_gpu():
    left, right = {0, 1, 4, 5}, {2, 3, 6, 7}
    assert share_cores(set(range(8)), [right, left], hyperthreads(8)) == [right, left]
    # Two GPUs on one node share it, and what is near no GPU is not left idle.
    assert share_cores(set(range(8)), [left, left], hyperthreads(8)) == [{0, 4, 2, 6}, {1, 5, 3, 7}]


def test_only_what_is_allowed():
    for near in ([set(), set()], [{0, 1}, {4, 5, 6}], [{4}, set()]):
        shares = share_cores({4, 5, 6}, near, lambda cpu: {cpu})
        assert set.union(*shares) == {4, 5, 6} and not shares[0] & shares[1]


def test_more_ranks_than_cores():
    assert share_cores({0, 1}, [set()] * 3, lambda cpu: {cpu}) == [{0, 1}, {0}, {1}]


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
