"""The ring that brings optimizer states from NVMe to the CPU's step and back."""

import errno
import os
from pathlib import Path

import pytest
import torch

from trainer.engine import state_ring
from trainer.errors import RunError
from trainer.system.swap_dir import SwapSpace

PIECE = 4096
SIZES = {0: 3 * PIECE + 5, 2: 100, 3: 2 * PIECE}
DTYPES = {"low": torch.int16, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}


@pytest.fixture(params=[2, 6])
def ring(request, tmp_path, monkeypatch):
    monkeypatch.setattr(state_ring, "RING_PIECE", PIECE)
    monkeypatch.setattr(state_ring, "RING_SLOTS", request.param)
    space = SwapSpace(tmp_path / "own")
    space.own()
    space.reserve_space(0, 2**20, 1)
    yield state_ring.StateRing(space, 0, SIZES, DTYPES)
    space.close()


def values(group, key, dtype):
    """What the tests write: other numbers for every element, tensor and sub-group."""
    begin = 1000 * group + 100 * list(DTYPES).index(key)
    return (torch.arange(SIZES[group]) % 3000 + begin).to(dtype)


def add(ring, times=1):
    """Add the values in one step, of each piece its own. Return the pieces as they came."""
    came = []

    def make(piece, tensors):
        came.append(piece)
        assert {key: tensor.dtype for key, tensor in tensors.items()} == DTYPES
        for key, tensor in tensors.items():
            more = values(piece.group, key, tensor.dtype)
            tensor += more[piece.begin : piece.begin + piece.numel]

    for _ in range(times):
        ring.step(SIZES, make)
    return came


def on_disk(ring, group, key):
    with open(ring.path(group, key), "rb") as file:
        content = file.read()
    assert len(content) % 4096 == 0
    return torch.frombuffer(bytearray(content), dtype=DTYPES[key])[: SIZES[group]]


def test_every_element_once_a_step(ring):
    came = add(ring, 3)
    assert (
        came
        == [
            (group, begin, min(PIECE, numel - begin))
            for group, numel in SIZES.items()
            for begin in range(0, numel, PIECE)
        ]
        * 3
    )
    for group in SIZES:
        for key, dtype in DTYPES.items():
            assert torch.equal(on_disk(ring, group, key), 3 * values(group, key, dtype))
    assert ring.on_disk == set(SIZES)
    ring.space.audit()


def test_what_is_restored_is_not_read(ring, monkeypatch):
    add(ring)
    monkeypatch.setattr(os, "preadv", None)
    ring.step([0, 3], lambda piece, tensors: [t.fill_(7) for t in tensors.values()], read=False)
    monkeypatch.undo()
    assert (on_disk(ring, 0, "exp_avg") == 7).all() and (on_disk(ring, 3, "low") == 7).all()
    assert torch.equal(on_disk(ring, 2, "low"), values(2, "low", torch.int16))


@pytest.mark.parametrize("damage", ["one bit", "stale", "short", "gone", "hole", "link"])
@pytest.mark.parametrize("group, key", [(0, "exp_avg_sq"), (2, "low"), (3, "exp_avg")])
def test_other_bytes_are_found(ring, tmp_path, damage, group, key):
    add(ring)
    path = ring.path(group, key)
    old = Path(path).read_bytes()
    add(ring)
    if damage == "one bit":
        with open(path, "r+b") as file:
            file.seek(100)
            byte = file.read(1)[0]
            file.seek(100)
            file.write(bytes([byte ^ 4]))
    elif damage == "stale":
        Path(path).write_bytes(old)
    elif damage == "short":
        os.truncate(path, 0)
    elif damage == "hole":
        with open(path, "r+b") as file:
            os.truncate(file.fileno(), 0)
            os.truncate(file.fileno(), len(old))
    else:
        os.rename(path, tmp_path / "there")
        if damage == "link":
            os.symlink(tmp_path / "there", path)
    with pytest.raises(RunError) as error:
        add(ring)
    assert path in str(error.value) and error.value.code == 1
    assert ("before the last write" in str(error.value)) == (damage == "stale")


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
@pytest.mark.parametrize("fault", ["error", "short"])
def test_transfers_that_fail(ring, monkeypatch, call, fault):
    add(ring)
    plain, calls = getattr(os, call), []

    def failing(handle, buffers, offset):
        calls.append(offset)
        if len(calls) < 4:
            return plain(handle, buffers, offset)
        if fault == "error":
            raise OSError(errno.EIO, "Input/output error")
        return plain(handle, [buffers[0][:512]], offset)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(RunError, match="a swap file is damaged") as error:
        add(ring)
    assert ("Input/output error" if fault == "error" else "512 bytes") in str(error.value)
    assert len(calls) >= 4


def test_no_room(ring, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match="no room for a swap file"):
        add(ring)
    assert not ring.on_disk


def test_an_error_of_the_step_is_told(ring):
    with pytest.raises(ZeroDivisionError):
        ring.step(SIZES, lambda piece, tensors: 1 / 0)
