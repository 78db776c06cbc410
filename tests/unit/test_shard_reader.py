"""A rank's shards, read from safetensors files."""

import pytest
import torch
from safetensors.torch import save_file
from transformers.core_model_loading import Transpose, WeightConverter, WeightRenaming

from trainer.engine import shard_reader
from trainer.errors import RunError


def files(folder):
    return [folder / "a.safetensors", folder / "b.safetensors"]


class Model(torch.nn.Module):
    """Two matrices and a bias under a prefix, and a head that is tied."""

    base_model_prefix = "model"

    def __init__(self, dtype, ranks):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
        self.head = torch.nn.Linear(5, 7, bias=False)
        self.head.weight = self.model[0].weight
        for param in self.parameters():
            size = -(-param.numel() // ranks)
            param.ds_shape, param.ds_numel = param.shape, param.numel()
            param.ds_tensor = torch.full((size,), 9.0, dtype=dtype)
            param.ds_tensor.final_location = None
            param.ds_secondary_tensor, param.ds_process_group = None, None


def stored(folder):
    """Write a checkpoint in two files, and return its tensors."""
    whole = {
        "0.weight": torch.randn(7, 5),
        "model.0.bias": torch.randn(7),
        "model.1.weight": torch.randn(3, 7),
        "old.bias": torch.randn(3),
    }
    whole["head.weight"] = whole["0.weight"].clone()
    names = list(whole)
    for file, keys in zip(files(folder), (names[:2], names[2:]), strict=True):
        save_file({key: whole[key] for key in keys}, file)
    return whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_rank_reads_its_part(tmp_path, monkeypatch, ranks, dtype):
    whole = stored(tmp_path)
    del whole["head.weight"]  # a tied weight, stored once
    monkeypatch.setattr(shard_reader, "PIECE", 32)  # bytes: many reads of a matrix
    transforms = [WeightRenaming("old", "model.1")]
    for rank in range(ranks):
        monkeypatch.setattr(shard_reader.dist, "get_rank", lambda _, rank=rank: rank)
        model = Model(dtype, ranks)
        found = shard_reader._direct(
            model, whole, transforms, shard_reader._stored(files(tmp_path))
        )
        assert found.keys() == whole.keys() - {"old.bias"}  # renamed: the other way
        assert found["0.weight"].name == "model.0.weight"
        reads = [r for w in found.values() for r in shard_reader._reads(w.param, w.stored)]
        assert len(reads) > 3 and all(read.size <= 32 for read in reads)
        shard_reader._run(reads)
        for weight, tensor in ((w, whole[key]) for key, w in found.items()):
            shard = weight.param.ds_tensor
            padded = torch.zeros(shard.numel() * ranks)
            padded[: tensor.numel()] = tensor.flatten()
            assert torch.equal(shard, padded[rank * len(shard) :][: len(shard)].to(dtype))


def test_what_is_left_to_transformers(tmp_path):
    """What is converted, has a hook, is stored twice, or is not partitioned yet."""
    whole = stored(tmp_path)
    transforms = [WeightConverter(["1.weight"], ["1.weights"], operations=[Transpose()])]
    places = shard_reader._stored(files(tmp_path))
    model = Model(torch.float32, 1)
    assert "model.1.weight" not in shard_reader._direct(model, whole, transforms, places)
    model.model[0].register_load_state_dict_pre_hook(lambda *_: None)
    assert shard_reader._direct(model, whole, [], places).keys() == {"model.1.weight"}
    del model.model[1].weight.ds_tensor
    assert not shard_reader._direct(model, whole, [], places)
    # Of two files that hold a name the last one counts, as where both are loaded in turn.
    save_file({"model.1.weight": torch.zeros(3, 7).to(torch.int8)}, tmp_path / "c.safetensors")
    assert "model.1.weight" not in shard_reader._stored(
        [*files(tmp_path), tmp_path / "c.safetensors"]
    )
    assert shard_reader._stored([*files(tmp_path), tmp_path / "c.bin"]) == {}


def test_machines_that_hold_other_weights(tmp_path):
    stored(tmp_path)
    one = {k: shard_reader._sample(s) for k, s in shard_reader._stored(files(tmp_path)).items()}
    assert shard_reader._agreed([one, {k: v for k, v in one.items() if k != "old.bias"}]) == sorted(
        one.keys() - {"old.bias"}
    )
    with pytest.raises(RunError, match="other weights"):
        shard_reader._agreed([one, {**one, "old.bias": b"others"}])
    with pytest.raises(RunError, match="cannot be read"):
        shard_reader._refused(lambda: shard_reader._stored([tmp_path / "no.safetensors"]))


def test_a_file_that_ends_too_early(tmp_path):
    stored(tmp_path)
    place = shard_reader._stored(files(tmp_path))["head.weight"]
    read = shard_reader.Read(place.path, place.begin, place.dtype, torch.zeros(35))
    shard_reader._run([read])
    with open(place.path, "r+b") as file:
        file.truncate(place.begin + 100)
    with pytest.raises(RunError, match="not readable") as error:
        shard_reader._run([read])
    assert "40 bytes too early" in str(error.value)
