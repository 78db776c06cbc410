"""What one model family does: each column of docs/models.md is measured here."""

import contextlib
import copy
import io
import json
import math
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import Run, make_tokenizer, samples
from conftest import train as launch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import swap_flags

from tests.families import reference
from tests.families.configs import FAMILIES, make_model
from tests.families.matrix import EXACT, FAILED, NO_EXPERTS, NOT_MEASURED, REFUSED, STEPS, TOLERANCE

ROOT = Path(__file__).resolve().parent.parent.parent
MAX_LENGTH, BATCH = 128, 4
PACKED_ROWS = 2
TIMEOUT = 900  # seconds of a run
WEIGHT = "weight/"  # begins the name of a weight in a checkpoint's shard
WIDTH = 160  # characters of a cell
FLAGS = (
    f"--validation_split 0 --precision fp32 --max_length {MAX_LENGTH} --max_steps "
    f"{STEPS} --learning_rate {reference.LEARNING_RATE} --adam_epsilon "
    f"{reference.EPSILON} --max_grad_norm {reference.CLIP} --lr_scheduler_type cosine "
    f"--warmup_steps {reference.WARMUP} --report_to none"
).split()
PLANNED_FOR = "--gpus 1 --gpu_memory 80GB --ram 1TB --json".split()
LORA = "--method lora --lora_r 8 --save_steps 1 --save_total_limit 20".split()
FULL = ["--save_strategy", "no"]
EXPERTS = re.compile(r"num_(local_)?experts|n_routed_experts|moe_num_experts")


class Refused(Exception):
    """The trainer has refused it with exit code 2; the text is the reason that it gave."""


class Failed(Exception):
    """It is neither exact nor refused."""


@dataclass
class Trained:
    """A run, the model of the plain loop after the same steps, and how far they are apart."""

    run: Run
    model: Any
    distance: float

    @property
    def export(self) -> Path:
        return self.run.directory / "export"


def largest(pairs: list[tuple[float, float]], relative: bool = False) -> float:
    """Return the largest distance of the pairs; infinity where one is not finite."""
    distances = [abs(a - b) / (max(abs(b), 1e-12) if relative else 1.0) for a, b in pairs]
    return max((math.inf if math.isnan(d) else d for d in distances), default=0.0)


def tensors_apart(found: dict[str, torch.Tensor], needed: dict[str, torch.Tensor]) -> float:
    """Return the largest distance of two models' tensors, which have the same names."""
    if found.keys() != needed.keys():
        raise Failed(f"trained tensors differ: {_names(found.keys() ^ needed.keys())}")
    return max(
        largest([(float((found[n].float() - needed[n].float()).abs().max()), 0.0)]) for n in needed
    )


def within(distance: float, what: str) -> float:
    """Return the distance. Raise Failed where it is not exact."""
    if not distance <= TOLERANCE:
        raise Failed(f"{what} off by {distance:.1e}")
    return distance


def layout(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Return {tensor: (type, shape)} of a model directory."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = part.get_dtype(), part.get_shape()
    return found


def trained_values(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the weights of one rank's checkpoint by parameter, each flat."""
    found = {}
    for path in checkpoint.glob("rank-*.safetensors"):
        tensors = load_file(path)
        found |= {key.removeprefix(WEIGHT): t for key, t in tensors.items() if WEIGHT in key}
    return found


def _names(names: Any) -> str:
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first


class Family:
    """One family's tiny model, and what was measured of it.

    folder: where the model and the runs go. Runs are made once: several columns look at one.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.directory = folder / "model"
        self.parameters = sum(p.numel() for p in make_model(name, self.directory).parameters())
        self.tokenizer: Any = make_tokenizer(self.directory)
        self.data = folder / "rows.jsonl"
        lines = (ROOT / "data" / "samples" / "train.jsonl").read_text(encoding="utf-8")
        self.data.write_text("\n".join(lines.splitlines()[:60]) + "\n", encoding="utf-8")
        self.rows, _ = samples(self.tokenizer, self.data, MAX_LENGTH)
        self.known: dict[str, Any] = {}

    @property
    def has_experts(self) -> bool:
        return any(EXPERTS.fullmatch(key) for key in FAMILIES[self.name])

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """Return what `make` returns, or raise what it raises; it is called once for each key."""
        if key not in self.known:
            try:
                self.known[key] = make()
            except (Refused, Failed) as error:
                self.known[key] = error
        if isinstance(self.known[key], Exception):
            raise self.known[key]
        return self.known[key]

    # -- runs ----------------------------------------------------------------------------------
    def launch(self, name: str, *flags: Any, env: dict[str, str] | None = None) -> Run:
        """Train with launch/train.py. Raise Refused or Failed where it does not end with 0."""
        batch = PACKED_ROWS if "--packing" in flags else BATCH
        own = {
            "model_name_or_path": self.directory,
            "dataset": self.data,
            "nvme_path": self.folder / "swap",
            "per_device_train_batch_size": batch,
        }
        own_flags = [word for key, value in own.items() for word in (f"--{key}", value)]
        run = launch(
            self.folder / name,
            *own_flags,
            *swap_flags(self.folder),
            *FLAGS,
            *flags,
            env=env,
            timeout=TIMEOUT,
        )
        (self.folder / f"{name}.log").write_text(run.output, encoding="utf-8")
        self.check_exit(run.code, run.output)
        if len(run.losses) != STEPS:
            raise Failed(f"{len(run.losses)} losses of {STEPS} steps")
        return run

    def check_exit(self, code: int, output: str) -> None:
        """Raise Refused for exit code 2, Failed for any other than 0."""
        if code == 0:
            return
        said = re.search(r"error: (.*)(?:\n *found: +(.*))?", output)
        reason = ": ".join(filter(None, said.groups())) if said else "no word"
        reason = reason.replace(str(self.directory), "the model").replace(str(self.folder), "")
        if "Traceback" in output:
            last = [line for line in output.splitlines() if re.match(r"\w[\w.]*(Error|Exit)", line)]
            raise Failed(f"exit {code}, traceback: {last[-1] if last else reason}")
        raise (Refused if code == 2 else Failed)(reason if code == 2 else f"exit {code}: {reason}")

    def loop(self, model: Any, packed: bool = False) -> tuple[Any, list[float], list[float]]:
        """Train a model in plain PyTorch on the rows of a run. Return it, losses and norms."""
        length = MAX_LENGTH if packed else None
        steps = reference.batches(self.rows, PACKED_ROWS if packed else BATCH, length)
        return model, *reference.train(model, steps, self.tokenizer.pad_token_id)

    def full(self, name: str, *flags: Any) -> Trained:
        """Compare a run of all parameters with the plain loop."""
        packed = "--packing" in flags
        run = self.launch(name, *FULL, *flags)
        model, losses, norms = self.once(
            f"loop, packed {packed}", lambda: self.loop(reference.plain(self.directory), packed)
        )
        distance = self.losses_apart(run, losses, norms)
        exported = reference.plain(run.directory / "export").state_dict()
        weights = within(tensors_apart(exported, model.state_dict()), "final weights")
        return Trained(run, model, max(distance, weights))

    def lora(self, name: str, *flags: Any) -> Trained:
        """Compare a run of adapters with PEFT's in the plain loop."""
        from peft import PeftModel, get_peft_model_state_dict

        run = self.launch(name, *LORA, *flags)
        export = run.directory / "export"
        first = trained_values(run.directory / f"checkpoint-{reference.WARMUP}")
        try:
            start = reference.adapted(self.directory, export, first)
        except KeyError as error:
            raise Failed(f"the run does not train {error}, which PEFT trains") from None
        model, losses, norms = self.loop(start)
        distance = self.losses_apart(run, losses, norms)
        exported = PeftModel.from_pretrained(reference.plain(self.directory), str(export))
        found, needed = map(get_peft_model_state_dict, (exported, model))
        weights = within(tensors_apart(found, needed), "final adapter")
        return Trained(run, model, max(distance, weights))

    @staticmethod
    def losses_apart(run: Run, losses: list[float], norms: list[float]) -> float:
        """Return how far a run's losses and norms are from the loop's; not exact: raise Failed."""
        pairs = list(zip(run.losses, losses))
        for step, (found, needed) in enumerate(pairs, 1):
            within(largest([(found, needed)]), f"loss of step {step} ({found:.4f})")
        found_norms = [step["grad_norm"] for step in run.steps]
        norm = within(largest(list(zip(found_norms, norms)), relative=True), "gradient norm")
        return max(largest(pairs), norm)

    # -- exported models -----------------------------------------------------------------------
    def reloaded(self, folder: Path, trained: Any) -> float:
        """Load a model directory in plain transformers. Return its logits' largest distance.

        trained: the model of the plain loop. Raise Failed where the files are not those that
        transformers writes, or where a tensor is missing or left over.
        """
        files, own = layout(folder), layout(self.directory)
        if missing := own.keys() - files.keys():
            raise Failed(f"export lacks {_names(missing)}")
        if more := files.keys() - own.keys():
            raise Failed(f"export has more: {_names(more)}")
        if other := {name for name in own if files[name] != own[name]}:
            raise Failed(f"export has another type or shape: {_names(other)}")
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        model, info = loaded
        if wrong := {key: value for key, value in info.items() if value}:
            raise Failed(f"export reloaded with {wrong}")
        some = [self.rows[index] for index in range(4)]
        found, needed = (torch.cat(reference.logits(m, some)) for m in (model, trained))
        distance = float((found - needed).abs().max() / needed.abs().max())
        return within(distance, "reloaded logits")

    def merged(self, lora: Trained) -> float:
        """Merge an adapter with launch/export.py's command, and load the result."""
        from trainer.export import merge

        output = io.StringIO()
        target = lora.run.directory / "merged"
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                code = merge.main(["--merge", str(lora.run.directory), "--output", str(target)])
            except SystemExit as error:
                code = error.code
        self.check_exit(int(code or 0), output.getvalue())
        return self.reloaded(target, lora.model)

    # -- columns -------------------------------------------------------------------------------
    def column_plan(self) -> float:
        command = [sys.executable, "launch/plan.py", "--model", self.directory, *PLANNED_FOR]
        done = subprocess.run(
            [str(word) for word in command], cwd=ROOT, text=True, capture_output=True
        )
        self.check_exit(done.returncode, done.stderr + done.stdout)
        planned = json.loads(done.stdout)["model"]["parameters"]
        if planned != self.parameters:
            raise Failed(f"{planned:,} parameters planned, {self.parameters:,} in the model")
        return 0.0

    def column_full(self) -> float:
        return self.once("full", lambda: self.full("full")).distance

    def column_lora(self) -> float:
        return self.once("lora", lambda: self.lora("lora")).distance

    def column_experts(self) -> float:
        targets = ["--lora_target_modules", "experts"]
        trained = self.once("experts", lambda: self.lora("experts", *targets))
        return max(trained.distance, self.merged(trained))

    def column_nvme(self) -> float:
        trained = self.once("nvme", lambda: self.full("nvme", "--deepspeed", "ds_z3_nvme.json"))
        last = trained.run.steps[-1]
        if not (last["nvme_read_bytes"] and last["nvme_written_bytes"]):
            raise Failed("nothing was on NVMe")
        return trained.distance

    def column_packing(self) -> float:
        return self.once("packing", lambda: self.full("packing", "--packing")).distance

    def column_export(self) -> float:
        full = self.once("full", lambda: self.full("full"))
        # With the exported weights, whose distance is known: Qwen3-Next multiplies it by five.
        model = copy.deepcopy(full.model)
        model.load_state_dict(reference.plain(full.export).state_dict())
        distance = self.reloaded(full.export, model)
        try:
            lora = self.once("lora", lambda: self.lora("lora"))
        except Refused:  # there is nothing to merge
            return distance
        return max(distance, self.merged(lora))

    def column_liger(self) -> float:
        """Compare losses with and without Liger's kernels on the GPU, full and LoRA."""
        distance = 0.0
        for method in ("full", "lora"):
            runs = [
                self.launch(
                    f"liger-{method}-{on}",
                    *(LORA if method == "lora" else FULL),
                    *("--use_liger_kernel", on, "--export", "false"),
                    env={"DS_ACCELERATOR": "cuda"},
                )
                for on in ("true", "false")
            ]
            apart = largest(list(zip(runs[0].losses, runs[1].losses)))
            distance = max(distance, within(apart, f"{method}: losses"))
        return distance


def measure(name: str, columns: list[str], folder: Path) -> dict[str, str]:
    """Return {column: text} of one family. Nothing that a column does ends the others."""
    family = Family(name, folder)
    return {column: text_of(family, column) for column in columns}


def text_of(family: Family, column: str) -> str:
    """Measure one column. Return "exact (distance)", "refused: …", "FAILED: …" and the like."""
    if column == "experts" and not family.has_experts:
        return NO_EXPERTS
    if column == "liger" and not torch.cuda.is_available():
        return NOT_MEASURED
    try:
        distance = getattr(family, f"column_{column}")()
    except Refused as error:
        return f"{REFUSED}: {short(error)}"
    except Failed as error:
        return f"{FAILED}: {short(error)}"
    except Exception as error:
        traceback.print_exc()
        return f"{FAILED}: {type(error).__name__}: {short(error)}".replace(str(family.folder), "")
    return EXACT if column == "plan" else f"{EXACT} ({distance:.0e})"


def short(error: Exception) -> str:
    """Return an error's text, cut to what a cell of a table holds."""
    text = " ".join(str(error).split())
    return text if len(text) <= WIDTH else f"{text[:WIDTH].rsplit(' ', 1)[0]} …"
