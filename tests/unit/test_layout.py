"""The house: who may import whom, how long a file may be, and what stays without torch."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = sorted(p for d in ("launch", "trainer", "data") for p in (ROOT / d).rglob("*.py"))
# Layers inside trainer: a module imports its own layer and those before it.
LAYERS = [{"errors", "ds_schema", "args", "config"},
          {"hardware", "ops", "embedded", "names", "resume", "swap", "shapes", "plan", "box", "plan_command", "doctor", "servers",
           "calibrate", "auto"},
          {"offload", "host_step"},
          {"linear", "recompute", "attention", "rows", "model", "loss", "telemetry", "tracking", "export", "merge", "card",
           "zero_state", "checkpoint", "signals"},
          {"loop", "run", "held", "data_check", "supervise", "bench", "bench_box", "yardstick"}]
TORCH_FREE = ["trainer.errors", "trainer.args", "trainer.config", "trainer.ds_schema", "trainer.hardware", "trainer.run",
              "trainer.ops", "trainer.embedded", "trainer.rows", "trainer.names", "trainer.resume", "trainer.swap",
              "trainer.supervise", "trainer.plan", "trainer.shapes", "trainer.box", "trainer.plan_command", "trainer.doctor",
              "trainer.auto", "trainer.calibrate", "trainer.servers",
              "data.formats", "data.records", "data.source",
              "data.storage", "data.template", "data.tokenize", "data.pack", "data.validate"]


def imports(path):
    """Dotted names of what a file imports, wherever in the file."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_rule(path):
    here = path.relative_to(ROOT).parts[0]
    below = {"launch": {"trainer"}, "trainer": {"trainer", "data"}, "data": {"data"}}
    if here == "data" and "samples" in path.parts:
        below["data"] = set()
    for name in imports(path):
        top = name.split(".")[0]
        if top in ("launch", "trainer", "data"):
            assert top in below[here], f"{path} imports {name}"


def layer(module):
    return next(i for i, names in enumerate(LAYERS) if module in names)


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[-2] in ("trainer", "offload") and p.name != "__init__.py"],
                         ids=lambda p: p.stem)
def test_layers(path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "trainer" and len(parts) > 1 and parts[1] not in ("__version__",):
            assert layer(parts[1]) <= layer(path.stem), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_length(path):
    assert len(path.read_text().splitlines()) <= 450


@pytest.mark.parametrize("module", TORCH_FREE)
def test_without_torch(module):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_launch_holds_no_logic():
    for path in (ROOT / "launch").glob("*.py"):
        kinds = {type(node).__name__ for node in ast.parse(path.read_text()).body}
        assert not kinds & {"FunctionDef", "ClassDef", "For", "While"}, path
