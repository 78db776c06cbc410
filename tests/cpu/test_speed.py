"""Every speed feature changes the time and not the numbers."""

import json

import hjson
import pytest
from conftest import ROOT
from test_parity import close

FLAGS = [
    "--max_steps",
    12,
    "--per_device_train_batch_size",
    2,
    "--gradient_accumulation_steps",
    2,
    "--max_grad_norm",
    0.5,
    "--eval_strategy",
    "no",
    "--eval_on_start",
    "false",
    "--export",
    "false",
    "--save_strategy",
    "no",
]
LORA = ["--method", "lora", "--lora_r", 8]
STOCK = [
    "--fused_linear",
    "false",
    "--fused_step",
    "false",
    "--fused_loss",
    "false",
    "--leaf_modules",
    "false",
    "--kept_layers",
    "0",
]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_each_alone(trains, method):
    flags = [*FLAGS, *(LORA if method == "lora" else [])]
    stock = trains("stock", *flags, *STOCK, launcher=False)
    norms = [s["grad_norm"] for s in stock.steps]
    cases = {
        "step": ["--fused_step", "true"],
        "leaf": ["--leaf_modules", "true"],
        "kept": ["--kept_layers", "2"],
        "linear": ["--fused_linear", "true", "--leaf_modules", "true"],
        "all": [
            "--fused_step",
            "true",
            "--leaf_modules",
            "true",
            "--kept_layers",
            "1",
            "--fused_linear",
            "true",
            "--fused_loss",
            "true",
        ],
    }
    for name, own in cases.items():
        run = trains(name, *flags, *STOCK, *own, launcher=False)
        close(run.losses, stock.losses, 2e-5)
        assert [s["grad_norm"] for s in run.steps] == pytest.approx(norms, rel=1e-4), name


def test_where_the_step_is_not_ours(trains):
    """An optimizer on the GPU keeps its own step; the rest is as everywhere."""
    own = ["--leaf_modules", "true", "--kept_layers", "1", "--deepspeed", "ds_z3.json"]
    close(
        trains("own", *FLAGS, *own, launcher=False).losses,
        trains("stock", *FLAGS, *STOCK, launcher=False).losses,
        2e-5,
    )


HELD = """
import sys
sys.path[0] = {root!r}
from trainer import run
plain = run._start_processes

def start(*args):
    ranks = plain(*args)
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero
    step = Zero.step

    def stepped(self, closure=None):
        step(self, closure)
        buffers = self.optimizer_swapper.swap_buffer_manager.all_buffers
        places = [range(b.data_ptr(), b.data_ptr() + b.nbytes) for b in buffers]  # to which a read points the state
        held = sum(t.numel() for state in self.optimizer.state.values() for t in state.values()
                   if hasattr(t, "numel") and not any(t.data_ptr() in place for place in places))
        print("moments in RAM:", held / sum(self.fp16_partitioned_groups_flat_numel), flush=True)

    Zero.step = stepped
    return ranks

run._start_processes = start
run.leave(run.main())
"""


@pytest.mark.parametrize("config, weights", [("ds_z3_nvme_optimizer", 0), ("ds_z3_nvme", 4)])
def test_step_on_nvme(trains, tmp_path, config, weights):
    """The numbers of the step in RAM; gradients do not travel, and no moment stays in RAM, not even the first ones."""
    script = tmp_path / "held.py"
    script.write_text(HELD.format(root=str(ROOT)))
    expected = trains("stock", *FLAGS, *STOCK, launcher=False)
    written = {}
    for fused in ("true", "false"):
        run = trains(
            fused,
            *FLAGS,
            "--deepspeed",
            f"{config}.json",
            "--fused_step",
            fused,
            launcher=False,
            script=script,
        )
        close(run.losses, expected.losses, 2e-5)
        assert [s["grad_norm"] for s in run.steps] == pytest.approx(
            [s["grad_norm"] for s in expected.steps], rel=1e-4
        )
        assert ("in one pass" in run.output) == (fused == "true")
        held = [
            float(line.split()[-1])
            for line in run.output.splitlines()
            if line.startswith("moments in RAM: ")
        ]
        assert len(held) == 12 and max(held) < 0.1, (
            held
        )  # of two; what is under 1 MiB stays, here one sub-group
        written[fused] = (
            run.steps[-1]["nvme_written_bytes"] - run.steps[0]["nvme_written_bytes"]
        ) / 11
    # Weight and two moments; the gradients that are written otherwise are those of at least 1 MiB.
    assert written["true"] == pytest.approx(12 * 3_080_192 + weights * 9 * 2**18, rel=0.01)
    assert written["true"] < 0.85 * written["false"]


@pytest.mark.parametrize("method, in_ram", [("full", 1_500_000), ("lora", 20_000)])
def test_step_in_ram_with_parameters_on_nvme(trains, tmp_path, method, in_ram):
    """A configuration of the user's own: the last sub-group's values are out already, while earlier ones' updates still wait."""
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
            "--fused_step",
            fused,
            launcher=False,
        )
        for fused in ("true", "false")
    ]
    assert "in one pass" in runs[0].output and "in one pass" not in runs[1].output
    close(runs[0].losses, runs[1].losses, 2e-5)
    assert [s["grad_norm"] for s in runs[0].steps] == pytest.approx(
        [s["grad_norm"] for s in runs[1].steps], rel=1e-4
    )


SLOW = """
import ctypes, sys, time
sys.path[0] = {root!r}
from trainer import run
plain = run._start_processes

def start(*args):
    ranks = plain(*args)
    from trainer.engine import all_gather, cpu_step
    all_gather.install()
    handle = all_gather._Gathered
    all_gather._Gathered = lambda params, work: print("gathered", len(params)) or handle(params, work)
    run_plain = cpu_step.run

    def slowly(adam, updates, bits, threads):
        for i in range(len(updates)):
            time.sleep(0.05)
            run_plain(adam, (cpu_step.Update * 1).from_buffer(updates, i * ctypes.sizeof(cpu_step.Update)), bits, threads)

    cpu_step.run = slowly
    return ranks

run._start_processes = start
run.leave(run.main())
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_step_beside_the_forward_pass(trains, tmp_path, ranks):
    """Bit-equal: every parameter waits for its own update, in training, evaluation, checkpoints and export; on two ranks also with
    the gathering that GPUs have."""
    from safetensors.torch import load_file

    flags = [
        *FLAGS[:8],
        "--eval_strategy",
        "steps",
        "--eval_steps",
        5,
        "--save_steps",
        6,
        "--save_total_limit",
        5,
        "--leaf_modules",
        "true",
    ]
    script = (
        tmp_path / "slow.py"
    )  # an update takes longer than the forward pass needs to reach its parameters
    script.write_text(SLOW.format(root=str(ROOT)))
    runs = [
        trains("false", *flags, ranks=ranks, launcher=ranks > 1),
        trains(
            "true", *flags, "--overlap_step", "true", ranks=ranks, launcher=ranks > 1, script=script
        ),
    ]
    assert (
        "in one pass, beside the next forward pass" in runs[1].output
        and "in one pass, beside" not in runs[0].output
    )
    assert ("gathered 9" in runs[1].output) == (ranks > 1)  # a decoder layer
    assert runs[0].losses == runs[1].losses and len(runs[0].losses) == 12
    assert [e["eval_loss"] for e in runs[0].evaluations] == [
        e["eval_loss"] for e in runs[1].evaluations
    ]
    for step in (6, 12):
        saved = [sorted((r.directory / f"checkpoint-{step}").glob("rank-*")) for r in runs]
        for left, right in zip(*saved, strict=True):
            assert left.read_bytes() == right.read_bytes(), left
    exports = [load_file(r.directory / "export" / "model.safetensors") for r in runs]
    assert all((exports[0][name] == exports[1][name]).all() for name in exports[0])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_ranks(trains, method):
    flags = [
        *FLAGS[:2],
        "--max_steps",
        12,
        *FLAGS[6:],
        "--gradient_accumulation_steps",
        1,
        *(LORA if method == "lora" else []),
    ]
    own = ["--leaf_modules", "true", "--kept_layers", "1"]
    two = trains(
        "two", *flags, *own, "--per_device_train_batch_size", 2, "--bind_cores", "true", ranks=2
    )
    assert "each rank has cores of its own" in two.output
    close(
        two.losses,
        trains("stock", *flags, *STOCK, "--per_device_train_batch_size", 4, launcher=False).losses,
        1e-4,
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--kept_layers", "some"], "kept_layers is not a number"),
        (["--kept_layers", "9"], "more than there are"),
        (["--use_liger_kernel", "true"], "Liger's kernels cannot run here"),
    ],
)
def test_refused(trains, flags, words):
    assert words in trains("run", *FLAGS, *flags, code=2, launcher=False).output
