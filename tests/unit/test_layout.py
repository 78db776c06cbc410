"""The layout of the code: who may import whom, and what stays without torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = sorted(p for d in ("launch", "trainer", "data") for p in (ROOT / d).rglob("*.py"))
# Inside trainer a module imports its own layer and those before it.
LAYERS = [
    ("errors",),
    ("distributed",),
    ("console",),
    ("system",),
    ("config",),
    ("run_dir",),
    ("plan",),
    ("doctor",),
    ("engine",),
    ("modeling",),
    ("checkpoint",),
    ("monitor",),
    ("export",),
    ("data_setup",),
    ("prepare", "process_group", "trainer"),
    ("stages",),
    ("build", "finish"),
    ("run",),
    ("data_check", "measure", "supervise"),
]
WITHOUT_TORCH = (
    *("errors", "distributed", "console", "system", "config", "run_dir", "plan", "doctor"),
    *("data_setup", "prepare", "process_group", "run", "data_check", "supervise"),
)
ENGINE_ONLY = ("deepspeed.runtime", "deepspeed.ops")


def name_of(path):
    """trainer/plan/machine.py -> trainer.plan.machine."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Dotted names of what a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(module):
    """The number of the layer of trainer.<package or file>."""
    return next(i for i, names in enumerate(LAYERS) if module in names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_launch_trainer_data(path):
    here = path.relative_to(ROOT).parts[0]
    below = {
        "launch": {"trainer"},
        "trainer": {"trainer", "data"},
        "data": {"data"},
    }
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in ("launch", "trainer", "data") or top in below[here], (
            f"{path} imports {name}"
        )


@pytest.mark.parametrize(
    "path", [p for p in FILES if name_of(p).startswith("trainer.")], ids=name_of
)
def test_layers_inside_trainer(path):
    own = name_of(path).split(".")[1]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "trainer" and len(parts) > 1 and parts[1] not in ("__version__", "ROOT"):
            assert layer(parts[1]) <= layer(own), f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_engine_touches_the_inside_of_deepspeed(path):
    if not name_of(path).startswith("trainer.engine."):
        assert not [name for name in imports(path) if name.startswith(ENGINE_ONLY)]


def without_torch():
    """Every module that may not import torch."""
    for path in FILES:
        top, *rest = name_of(path).split(".")
        if top == "trainer" and rest and rest[0] in WITHOUT_TORCH:
            yield name_of(path)
        if top == "data" and rest != ["dataset"]:
            yield name_of(path)


@pytest.mark.parametrize("module", list(without_torch()))
def test_without_torch(module):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module}; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_are_short_and_typed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            where = f"{path}:{node.lineno} {node.name}"
            assert node.end_lineno - node.lineno < 80, f"{where} is too long"
            if "triton.jit" in map(ast.unparse, node.decorator_list):
                continue  # not Python: annotations do not compile
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            named = [a for a in arguments if a.arg not in ("self", "cls")]
            assert node.returns and all(a.annotation for a in named), f"{where} has no types"


def opens_text(call):
    """Whether a call opens a text file: open(path, "a"), path.read_text(), gzip.open(p, "rt")."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name in ("read_text", "write_text", "fdopen"):
        return name != "fdopen" or len(call.args) < 2 or "b" not in ast.unparse(call.args[1])
    if name != "open" or ast.unparse(call.func).split(".")[0] == "os":
        return False
    if isinstance(call.func, ast.Attribute):  # path.open, gzip.open: text only where they say so
        return any("t" in ast.unparse(mode) for mode in call.args[1:2])
    mode = call.args[1] if len(call.args) > 1 else None
    mode = next((word.value for word in call.keywords if word.arg == "mode"), mode)
    return mode is None or "b" not in ast.unparse(mode)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_text_files_are_utf_8(path):
    """In a locale such as GBK another encoding would be taken."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and opens_text(node):
            encodings = [w.value for w in node.keywords if w.arg == "encoding"]
            named = [str(getattr(value, "value", "")) for value in encodings]
            assert named and named[0].startswith("utf-8"), f"{path}:{node.lineno} has no encoding"


# They write into a directory that they have just made, where nobody else can put a link.
WORK_DIRECTORIES = {
    "data.storage",
    "data.tokenize",
    "trainer.data_setup",
    "trainer.export.merge",
    "trainer.export.model",
    "trainer.export.writer",
    "trainer.plan.model_shapes",
}


def writes_in_place(call):
    """Whether a call opens a file for writing that may be there, without data/files.py's care."""
    name, words = (
        ast.unparse(call.func),
        {word.arg: ast.unparse(word.value) for word in call.keywords},
    )
    if name.endswith((".write_text", ".write_bytes", ".touch")):
        return True
    if name == "os.open":
        return "O_CREAT" in ast.unparse(call) and "O_NOFOLLOW" not in ast.unparse(call)
    if name != "open" or "opener" in words:
        return False
    mode = words.get("mode", ast.unparse(call.args[1]) if len(call.args) > 1 else "")
    # `x` takes nothing that is there, also no link.
    return bool(set("wa+") & set(mode)) and "in_place(" not in ast.unparse(call)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_link_is_followed_by_what_is_written(path):
    if name_of(path) not in {"data.files", *WORK_DIRECTORIES}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert not writes_in_place(node), f"{path}:{node.lineno}: data.files.in_place"


def test_launch_holds_no_logic():
    for path in (ROOT / "launch").glob("*.py"):
        kinds = {type(node).__name__ for node in ast.parse(path.read_text()).body}
        assert not kinds & {"FunctionDef", "ClassDef", "For", "While"}, path


def test_documents_name_tests_that_exist():
    """`test_…` in a document is a test, or a file of them."""
    files = [*ROOT.glob("tests/*/test_*.py")]
    known = {path.stem for path in files}
    for path in files:
        known |= set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        named = set(re.findall(r"\btest_\w+", document.read_text(encoding="utf-8")))
        assert not named - known, f"{document.name} names {sorted(named - known)}"
