"""The methods of transformers.Trainer that OffloadTrainer overrides, in every version we allow.

Private ones can change in any release. Their parameters are compared in the lowest and the highest
version that setup.py allows, read from the wheels, and in the installed one.
"""

import ast
import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from trainer import ROOT

# method: parameters as OffloadTrainer takes them over
EXPECTED = {
    "_prepare_for_training": ["max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_load_rng_state": ["checkpoint"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_save_checkpoint": ["model", "trial"],
    "get_train_dataloader": [],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
    "log": ["logs", "start_time"],
}
PASSED_ON = ["_run_epoch", "get_batch_samples"]  # any parameters


def required_range():
    """(lowest, upper bound) of transformers in setup.py."""
    text = (ROOT / "setup.py").read_text()
    return re.search(r'"transformers>=([0-9.]+),<([0-9.]+)"', text).groups()


def download(requirement, folder):
    """The source of trainer.py from the package index's wheel; None without an index."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder]
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    wheels = list(Path(folder).glob("transformers-*.whl"))
    if done.returncode or not wheels:
        return None
    with zipfile.ZipFile(wheels[0]) as wheel:
        return wheel.read("transformers/trainer.py").decode()


def methods(source):
    """{method: parameters without self} of the class Trainer."""
    tree = ast.parse(source)
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Trainer").body
    return {
        node.name: [a.arg for a in (*node.args.args, *node.args.kwonlyargs)][1:]
        for node in body
        if isinstance(node, ast.FunctionDef)
    }


def overridden():
    """The methods of OffloadTrainer that Trainer has too."""
    source = (ROOT / "trainer" / "trainer.py").read_text()
    return set(methods(source.replace("class OffloadTrainer(", "class Trainer("))) - {"__init__"}


@pytest.mark.parametrize("which", ["installed", "lowest", "highest"])
def test_overridden_methods(which, tmp_path):
    low, below = required_range()
    if which == "installed":
        origin = Path(importlib.util.find_spec("transformers").origin)
        source = (origin.parent / "trainer.py").read_text()
    else:
        requirement = f"transformers=={low}.0" if which == "lowest" else f"transformers<{below}"
        source = download(requirement, tmp_path)
        if source is None:
            pytest.skip("no package index")
    theirs = methods(source)
    for name, parameters in EXPECTED.items():
        assert theirs[name] == parameters, f"transformers' Trainer.{name} has changed"
    for name in PASSED_ON:
        assert name in theirs, f"transformers' Trainer.{name} is gone"
    both = overridden() & theirs.keys()
    assert both == {*EXPECTED, *PASSED_ON}, "an override that this test does not know"
