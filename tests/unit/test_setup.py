"""setup.py declares exactly what the product imports, and ships what it reads."""

import ast
import re
import subprocess
import sys

from trainer import ROOT

# Import name -> package, where they differ.
PACKAGES = {
    "yaml": "pyyaml",
    "pynvml": "nvidia-ml-py",
    "liger_kernel": "liger-kernel",
    "huggingface_hub": "huggingface-hub",
}
# Declared, and imported by somebody else for us.
FOR_OTHERS = {
    "accelerate": "transformers.Trainer",
    "aiohttp": "fsspec, for https://",
    "s3fs": "fsspec, for s3://",
    "gcsfs": "fsspec, for gs://",
    "gguf": "transformers, for the default model",
    "ninja": "torch, for DeepSpeed's ops",
}


def product_files():
    command = ["git", "ls-files", "trainer/*.py", "data/*.py", "launch/*.py"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    return [path for name in names if (path := ROOT / name).exists()]


def imported():
    """Packages that the product imports, anywhere in a file."""
    found = set()
    for path in product_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    outside = found - set(sys.stdlib_module_names) - {"trainer", "data", "launch"}
    return {PACKAGES.get(name, name) for name in outside}


def declared():
    """(install_requires, extras of setup.py but notebook and test)."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
    }

    def names(requirements):
        return {re.match(r"[A-Za-z0-9_.-]+", text)[0] for text in requirements}

    extras = values["EXTRAS"]
    return names(values["REQUIRES"]), names([*extras["gpu"], *extras["plot"]])


def test_declared_is_imported():
    required, optional = declared()
    assert imported() - required - optional == set(), "imported and not declared"
    assert required - imported() - FOR_OTHERS.keys() == set(), "declared and not imported"
    assert FOR_OTHERS.keys() <= required and not optional & required


def test_an_installed_product_finds_its_files(tmp_path):
    """pip install . (not -e): recipes, configurations and launch files come along."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    copy = tmp_path / "checkout"
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in files:
        if name and (ROOT / name).is_file() and not name.startswith(("docs/", "tests/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    site = tmp_path / "site"
    subprocess.run([*command, "--target", site, copy], check=True)
    code = (
        "from trainer.config.ds_config import DeepSpeedConfig\n"
        "from trainer.config.settings import resolve\n"
        "from data.source import resolve as rows\n"
        "from trainer.data_setup import SAMPLES\n"
        "import trainer, pathlib\n"
        f"assert pathlib.Path(trainer.__file__).is_relative_to({str(site)!r})\n"
        "DeepSpeedConfig.load('ds_z3_offload.json')\n"
        "print(resolve(['--config', 'llama3_8b_lora']).method)\n"
        "print(rows([str(SAMPLES / 'train.jsonl')])[0])\n"
        "from trainer.system import ops; print(ops.adam())\n"
    )
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "lora" in done.stdout, done.stderr
    help_text = [sys.executable, site / "launch" / "train.py", "--help"]
    done = subprocess.run(help_text, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "--deepspeed" in done.stdout, done.stderr
