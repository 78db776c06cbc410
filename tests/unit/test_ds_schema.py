"""The keys that DeepSpeed reads one by one, against its source."""

import ast
import importlib.util
from pathlib import Path

from trainer.config import ds_schema

RUNTIME = Path(importlib.util.find_spec("deepspeed").origin).parent / "runtime"


def constants(file, prefix):
    """Return {name: text} of the constants of a module that begin with the prefix."""
    return {
        node.targets[0].id: node.value.value
        for node in ast.parse((RUNTIME / file).read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        and node.targets[0].id.startswith(prefix)
    }


def test_aio_keys():
    names = constants("swap_tensor/constants.py", "AIO_")
    names.pop("AIO_FORMAT")
    block = ds_schema.config().keys["aio"].kind
    assert {key.name for key in block.keys.values()} == set(names.values())


def test_removed_keys():
    """What DeepSpeed refuses by name, so do we."""
    for node in ast.parse((RUNTIME / "config.py").read_text(encoding="utf-8")).body:
        name = node.targets[0].id if isinstance(node, ast.Assign) else ""
        if name.startswith("_REMOVED_") and name.endswith("_KEYS"):
            assert {key.value for key in node.value.keys} <= set(ds_schema.GONE)


def test_blocks_that_deepspeed_reads_with_a_class():
    keys = ds_schema.config().keys
    zero = keys["zero_optimization"].kind.keys
    assert zero["max_live_parameters"] is zero["stage3_max_live_parameters"]
    assert zero["max_live_parameters"].name == "stage3_max_live_parameters"
    assert zero["reduce_bucket_size"].above == 0 and zero["sub_group_size"].low == 0
    assert zero["offload_optimizer"].kind.keys["ratio"].high == 1
    assert zero["leaf_module"].kind.keys["names"].kind is list
    assert keys["bfloat16"].kind is keys["bf16"].kind
    assert keys["fp16"].kind.keys["loss_scale"].kind is float
