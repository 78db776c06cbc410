"""Every speed feature changes the time and not the numbers."""

import json
from textwrap import indent

import hjson
import pytest
from conftest import ROOT, inputs, make_model, make_tokenizer, only, train
from test_parity import close
from tiny import SPLITS, tiers_flags

STEPS = "--max_steps 12 --max_grad_norm 0.5".split()
BATCH = "--per_device_train_batch_size 2 --gradient_accumulation_steps 2".split()
QUIET = "--eval_strategy no --eval_on_start false --export false --save_strategy no".split()
FLAGS = [*STEPS, *BATCH, *QUIET]
LORA = ["--method", "lora", "--lora_r", 8]
STOCK = ["--disable_optimizations", "all", "--kept_layers", "0"]
long = pytest.mark.long
# Beside the two of a GPU.
OURS = only("fused_loss", "fused_linear", "fused_step", "leaf_modules", "resident_weights")


@long
@pytest.mark.parametrize("method", ["full", "lora"])
def test_each_alone(trains, method):
    flags = [*FLAGS, *(LORA if method == "lora" else [])]
    stock = trains("stock", *flags, *STOCK)
    norms = [s["grad_norm"] for s in stock.steps]
    cases = {
        "step": only("fused_step"),
        "leaf": only("leaf_modules"),
        "kept": [*only(), "--kept_layers", "2"],
        "resident": only("fused_step", "resident_weights"),
        "linear": only("fused_linear", "leaf_modules"),
        "all": [*OURS, "--kept_layers", "1"],
    }
    for name, own in cases.items():
        run = trains(name, *flags, *STOCK, *own)
        close(run.losses, stock.losses, 2e-5)
        assert [s["grad_norm"] for s in run.steps] == pytest.approx(norms, rel=1e-4), name


def test_where_the_step_is_not_ours(trains):
    """An optimizer on the GPU keeps its own step. The other features are on."""
    own = [*OURS, "--kept_layers", "1", "--deepspeed", "ds_z3.json"]
    close(
        trains("own", *FLAGS, *own).losses,
        trains("stock", *FLAGS, *STOCK).losses,
        2e-5,
    )


# launch/train.py whose ranks, once they have joined, run with a change.
CHANGED = """
import os, sys
sys.path[0] = os.getcwd()
from trainer import run
plain_join = run.join

def join(*args):
    ranks = plain_join(*args)
{}
    return ranks

run.join = join
run.leave(run.main())
"""


def changed(path, change):
    """Write a script that is launch/train.py with this change. Return its path."""
    path.write_text(CHANGED.format(indent(change, "    ")))
    return path


# Prints after each step how many elements of the moments are in RAM, for each parameter.
PRINT_MOMENTS = """
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
plain_step = DeepSpeedZeroOptimizer_Stage3.step

def step(self, closure=None):
    plain_step(self, closure)
    values = [v for state in self.optimizer.state.values() for v in state.values()]
    in_ram = sum(v.numel() for v in values if hasattr(v, "numel"))
    parameters = sum(self.fp16_partitioned_groups_flat_numel)
    print("moments in RAM:", in_ram / parameters, flush=True)

DeepSpeedZeroOptimizer_Stage3.step = step
"""


@pytest.mark.parametrize(
    "config, weights", [pytest.param("ds_z3_nvme_optimizer", 0, marks=long), ("ds_z3_nvme", 4)]
)
def test_step_on_nvme(trains, tmp_path, config, weights):
    """The numbers are those of the step in RAM.

    Gradients do not travel. No moment stays in RAM, not even the first ones.
    """
    script = changed(tmp_path / "print_moments.py", PRINT_MOMENTS)
    expected = trains("stock", *FLAGS, *STOCK)
    run = trains("nvme", *FLAGS, "--deepspeed", f"{config}.json", script=script)
    close(run.losses, expected.losses, 2e-5)
    assert [s["grad_norm"] for s in run.steps] == pytest.approx(
        [s["grad_norm"] for s in expected.steps], rel=1e-4
    )
    assert "in one pass" in run.output
    lines = [line for line in run.output.splitlines() if line.startswith("moments in RAM: ")]
    in_ram = [float(line.split()[-1]) for line in lines]
    # Of two for each parameter. What is under 1 MiB stays: here one sub-group.
    assert len(in_ram) == 12 and max(in_ram) < 0.1, in_ram
    first, *_, last = (s["nvme_written_bytes"] for s in run.steps)
    # Weight and two moments, in fp32; and the parameters of at least 1 MiB.
    written = 12 * 3_080_192 + weights * 9 * 2**18
    assert (last - first) / 11 == pytest.approx(written, rel=0.01)


@pytest.mark.parametrize(
    "method, in_ram", [("full", 1_500_000), pytest.param("lora", 20_000, marks=long)]
)
def test_step_in_ram_with_parameters_on_nvme(trains, tmp_path, method, in_ram):
    """A configuration of the user's own.

    The values of the last sub-group are written already, while the steps of earlier ones wait.
    """
    config = hjson.loads((ROOT / "deepspeed_configs/ds_z3_nvme.json").read_text())
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    config["zero_optimization"]["offload_param"]["max_in_cpu"] = in_ram
    config["zero_optimization"]["sub_group_size"] = in_ram // 4
    path = tmp_path / "own.json"
    path.write_text(json.dumps(config))
    runs = [
        trains(
            fused,
            *FLAGS,
            *(LORA if method == "lora" else []),
            "--deepspeed",
            path,
            "--disable_optimizations",
            "auto" if fused == "true" else "fused_step",
        )
        for fused in ("true", "false")
    ]
    assert "in one pass" in runs[0].output and "in one pass" not in runs[1].output
    close(runs[0].losses, runs[1].losses, 2e-5)
    assert [s["grad_norm"] for s in runs[0].steps] == pytest.approx(
        [s["grad_norm"] for s in runs[1].steps], rel=1e-4
    )


# The step of a sub-group takes longer than the forward pass needs to
# reach its parameters. The gathering is that of GPUs.
SLOW_STEP = """
import ctypes, time
from deepspeed.runtime.zero.partition_parameters import Init
from trainer.engine import all_gather, cpu_adam
plain_handle, plain_run = all_gather.AllGatherHandle, cpu_adam.run

def handle(params, work):
    print("gathered", len(params))
    return plain_handle(params, work)

def slow_run(adam, updates, threads):
    for i in range(len(updates)):
        time.sleep(0.05)
        offset = i * ctypes.sizeof(cpu_adam.Update)
        one = (cpu_adam.Update * 1).from_buffer(updates, offset)
        plain_run(adam, one, threads)

Init._convert_to_deepspeed_param = all_gather.convert_to_deepspeed_param
all_gather.AllGatherHandle, cpu_adam.run = handle, slow_run
"""


# Norms are not resident, as where their sub-group is in RAM and the others are on a GPU: a layer
# has its hooks, and fetches nothing, as norms stay gathered.
MIXED = """
from trainer.engine import resident
plain = resident.is_plain
resident.is_plain = lambda param: plain(param) and len(param.ds_shape) > 1
"""
ON_NVME = ["--deepspeed", "ds_z3_nvme_optimizer.json"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_step_beside_the_forward_pass(trains, tmp_path, ranks):
    """Bit-equal, for every parameter waits for its own step.

    In training, evaluation, checkpoints and export. On two ranks also with the gathering of GPUs.
    """
    from safetensors.torch import load_file

    often = "--eval_strategy steps --eval_steps 5 --save_steps 6 --save_total_limit 5".split()
    flags = [*STEPS, *BATCH, *often]
    script = changed(tmp_path / "slow_step.py", SLOW_STEP)
    mixed = changed(tmp_path / "mixed.py", SLOW_STEP + MIXED)
    options = {"ranks": ranks, "launcher": ranks > 1}
    beside = ["--disable_optimizations", "none,fetch_ahead"]
    runs = [
        trains("false", *flags, *OURS, **options),
        trains("true", *flags, *beside, **options, script=script),
        trains("mixed", *flags, *beside, **options, script=mixed),
        trains("kept", *flags, *beside, "--kept_weights", 3, **options, script=script),
        trains("nvme", *flags, *beside, *ON_NVME, **options, script=script),
    ]
    assert "in one pass, beside the next forward pass" in runs[1].output
    assert "in one pass, beside" not in runs[0].output
    for run in runs[1:]:
        assert ("gathered 9" in run.output) == (ranks > 1)  # a decoder layer
    assert len(runs[0].losses) == 12 and all(run.losses == runs[0].losses for run in runs)
    first, *others = ([e["eval_loss"] for e in run.evaluations] for run in runs)
    assert others == [first] * 4
    for step in (6, 12):
        saved = [sorted((r.directory / f"checkpoint-{step}").glob("rank-*")) for r in runs]
        for one, *others in zip(*saved, strict=True):
            assert all(other.read_bytes() == one.read_bytes() for other in others), one
    exports = [load_file(r.directory / "export" / "model.safetensors") for r in runs]
    for name, tensor in exports[0].items():
        assert all((export[name] == tensor).all() for export in exports[1:])


# The 60th transfer of an optimizer state fails.
FAILING_DISK = """
import errno, itertools
from trainer.engine import state_ring

plain, count = state_ring._call, itertools.count(1)

def call(function, *args):
    def failing(*_):
        raise OSError(errno.EIO, "Input/output error")
    plain(failing if next(count) == 60 else function, *args)

state_ring._call = call
"""


@pytest.mark.parametrize("beside, split", [("none", None), ("auto", None), ("none", SPLITS[4])])
def test_a_failing_disk(tiny_model, rows_file, tmp_path, beside, split):
    """It ends the run before a layer is computed with weights that were not made."""
    script = changed(tmp_path / "failing_disk.py", FAILING_DISK)
    config = tiers_flags(tmp_path, split, 3_213_056) if split else ON_NVME
    flags = [*inputs(tiny_model, rows_file, tmp_path), *config, *STEPS, *BATCH]
    flags += ["--precision", "fp32", "--max_length", 96, "--disable_optimizations", beside]
    calm = train(tmp_path / "calm", *flags, launcher=False)
    assert calm.code == 0, calm.output[-3000:]
    run = train(tmp_path / "run", *flags, launcher=False, script=script, timeout=120)
    assert run.code == 1 and "a swap file is damaged" in run.output, run.output[-3000:]
    assert "Input/output error" in run.output and "Traceback" not in run.output
    made = run.losses
    assert ("beside the next" in run.output) == (beside == "none")
    assert 0 < len(made) < len(calm.losses) and made == calm.losses[: len(made)]


# Says after each forward pass which layers ZeRO-3 has not released.
STAYING = """
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
plain = PartitionedParameterCoordinator.release_sub_module

def release(self, module, forward=False):
    plain(self, module, forward)
    released = {"NOT_AVAILABLE"} & {p.ds_status.name for p in module.parameters()}
    if type(module).__name__ == "LlamaDecoderLayer" and forward:
        print("released" if released else "stays", flush=True)

PartitionedParameterCoordinator.release_sub_module = release
"""


@pytest.mark.parametrize("kept, staying", [(0, 3), (5, 6)])
def test_releases_follow_the_order_of_modules(trains, tmp_path, kept, staying):
    """Two layers stay, or as many as kept_weights says, though the first pass has no backward.

    One more does: the look-ahead has passed over it by then.
    """
    script, model = changed(tmp_path / "staying.py", STAYING), tmp_path / "model"
    make_model(model, num_hidden_layers=8)
    make_tokenizer(model)
    own = f"--max_steps 4 --per_device_train_batch_size 2 --kept_layers 8 --kept_weights {kept}"
    flags = ["--model_name_or_path", model, *own.split(), *QUIET, *only("leaf_modules")]
    run = trains("run", *flags, script=script)
    said = [line for line in run.output.splitlines() if line in ("released", "stays")]
    assert said[-8:] == ["released"] * (8 - staying) + ["stays"] * staying


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_ranks(trains, method):
    lora = LORA if method == "lora" else []
    flags = [*STEPS, *QUIET, "--gradient_accumulation_steps", 1, *lora]
    ours = [*OURS, "--kept_layers", "1", "--per_device_train_batch_size", 2]
    stock = [*STOCK, "--per_device_train_batch_size", 4]
    two = trains("two", *flags, *ours, ranks=2)
    one = trains("stock", *flags, *stock)
    close(two.losses, one.losses, 1e-4)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--kept_layers", "some"], "kept_layers is not a number"),
        (["--kept_layers", "9"], "more than there are"),
        (["--kept_weights", "two"], "kept_weights is not a number"),
        (["--kept_weights", "2"], "weights cannot stay"),
        (["--kept_weights", "9", *only("leaf_modules")], "more than there are layers"),
        (["--use_liger_kernel", "true"], "Liger's kernels cannot run here"),
    ],
)
def test_refused(trains, flags, words):
    assert words in trains("run", *FLAGS, *flags, code=2).output
