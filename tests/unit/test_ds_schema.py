"""The key table against DeepSpeed's own classes, read from its source."""

import ast
import importlib.util
from pathlib import Path

import pytest

from trainer.config import ds_schema

RUNTIME = Path(importlib.util.find_spec("deepspeed").origin).parent / "runtime"


def fields(file, name):
    body = next(
        n
        for n in ast.parse((RUNTIME / file).read_text()).body
        if isinstance(n, ast.ClassDef) and n.name == name
    ).body
    for node in body:
        if isinstance(node, ast.AnnAssign):
            keywords = node.value.keywords if isinstance(node.value, ast.Call) else []
            alias = next((k.value.value for k in keywords if k.arg == "alias"), None)
            yield alias or node.target.id


@pytest.mark.parametrize(
    "file, name, table",
    [
        ("zero/config.py", "DeepSpeedZeroConfig", ds_schema.ZERO),
        (
            "zero/offload_config.py",
            "DeepSpeedZeroOffloadParamConfig",
            ds_schema.ZERO["offload_param"],
        ),
        (
            "zero/offload_config.py",
            "DeepSpeedZeroOffloadOptimizerConfig",
            ds_schema.ZERO["offload_optimizer"],
        ),
        (
            "zero/leaf_module_config.py",
            "DeepSpeedZeroLeafModuleConfig",
            ds_schema.ZERO["leaf_module"],
        ),
        ("precision_config.py", "DeepSpeedBF16Config", ds_schema.BF16),
        ("precision_config.py", "DeepSpeedFP16Config", ds_schema.FP16),
    ],
)
def test_same_keys(file, name, table):
    assert set(fields(file, name)) == set(table)


def test_aio_keys():
    source = (RUNTIME / "swap_tensor" / "constants.py").read_text()
    names = {
        node.value.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and node.targets[0].id.startswith("AIO_")
        and not node.targets[0].id.endswith(("_DEFAULT", "_BYTES"))
        and isinstance(node.value.value, str)
        and node.targets[0].id not in ("AIO_FORMAT",)
    }
    assert set(ds_schema.AIO) == names
