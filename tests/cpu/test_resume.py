"""A resumed run is the uninterrupted one: the same losses, the same checkpoint to the bit."""

import shutil

import pytest

STEPS, CUT = 6, 3
BATCH = "--per_device_train_batch_size 2 --gradient_accumulation_steps 2".split()
OTHERS = "--eval_strategy no --eval_on_start false --export false --max_grad_norm 0.5".split()
FLAGS = f"--max_steps {STEPS} --save_steps {CUT} --save_total_limit 5".split() + BATCH + OTHERS
LORA = ["--method", "lora", "--lora_r", 8, "--lora_dropout", 0.1]
CONFIGS = ["ds_z3", "ds_z3_offload", "ds_z3_nvme_optimizer", "ds_z3_nvme"]


@pytest.fixture
def trains(trains):
    """One rank needs no launcher, which takes seconds to start."""
    return lambda *args, ranks=1, **options: trains(
        *args, **{"ranks": ranks, "launcher": ranks > 1, **options}
    )


long = pytest.mark.long


@pytest.mark.parametrize(
    "config, method, ranks",
    [
        *((c, "full", 1) for c in CONFIGS),
        ("ds_z3_nvme", "lora", 1),
        ("ds_z3_nvme", "full", 2),
        pytest.param("ds_z3_offload", "full", 2, marks=long),
        *(pytest.param(c, "lora", 1, marks=long) for c in CONFIGS[:3]),
        pytest.param("ds_z3", "full", 2, marks=long),
        pytest.param("ds_z3_nvme_optimizer", "full", 2, marks=long),
        pytest.param("ds_z3_nvme", "lora", 2, marks=long),
    ],
)
def test_bit_equal(trains, config, method, ranks):
    flags = ["--deepspeed", f"{config}.json", *FLAGS, *(LORA if method == "lora" else [])]
    whole = trains("whole", *flags, ranks=ranks)
    assert [s["step"] for s in whole.steps] == list(range(1, STEPS + 1))
    again = trains(
        "again",
        *flags,
        "--resume_from_checkpoint",
        whole.directory / f"checkpoint-{CUT}",
        ranks=ranks,
    )
    assert "verified" in again.output and "saved  |" not in again.output
    assert again.losses == whole.losses[CUT:]
    assert [s["grad_norm"] for s in again.steps] == [s["grad_norm"] for s in whole.steps[CUT:]]
    assert [s["learning_rate"] for s in again.steps] == [
        s["learning_rate"] for s in whole.steps[CUT:]
    ]
    assert again.parts(STEPS) == whole.parts(STEPS) != whole.parts(CUT)


@pytest.mark.parametrize(
    "config, before, after",
    [
        pytest.param("ds_z3_nvme", 1, 2, marks=long),
        ("ds_z3_offload", 2, 1),
        pytest.param("ds_z3_nvme", 2, 1, marks=long),
        pytest.param("ds_z3_offload", 1, 2, marks=long),
        pytest.param("ds_z3_offload", 4, 2, marks=long),
        pytest.param("ds_z3_nvme", 4, 2, marks=long),
    ],
)
def test_another_world_size(trains, config, before, after):
    saves = "--max_steps 12 --save_steps 2 --save_total_limit 9".split()
    flags = ["--deepspeed", f"{config}.json", *OTHERS, *saves]
    own = ["--per_device_train_batch_size", 4 // before, "--gradient_accumulation_steps", 1]
    whole = trains("whole", *flags, *own, ranks=before)
    again = trains(
        "again",
        *flags,
        *own,
        "--resume_from_checkpoint",
        whole.directory / "checkpoint-2",
        ranks=after,
    )
    assert "rows of an optimizer step" in again.output and len(again.losses) == 10
    assert again.losses == pytest.approx(whole.losses[2:], abs=1e-4)
    assert again.manifest(12)["update_rows"] == 4


def test_across_configurations(trains):
    """Saved with everything in RAM, resumed from NVMe: the shards are the same."""
    whole = trains("whole", "--deepspeed", "ds_z3_offload.json", *FLAGS)
    again = trains(
        "again",
        "--deepspeed",
        "ds_z3_nvme.json",
        *FLAGS,
        "--resume_from_checkpoint",
        whole.directory / f"checkpoint-{CUT}",
    )
    assert again.losses == pytest.approx(whole.losses[CUT:], abs=1e-5)


def test_the_oracle(trains, tiny_model):
    """What a checkpoint holds is what DeepSpeed's own accessors give.

    The export has the same weights.
    """
    import torch
    from safetensors.torch import load_file

    run = trains(
        "run", "--deepspeed", "ds_z3_nvme_optimizer.json", *FLAGS, "--export", "true", ranks=2
    )
    slices = {}
    for path in sorted((run.directory / f"checkpoint-{STEPS}").glob("rank-*")):
        rank, tensors = path.name[5:10], load_file(path)
        slices.update({(k, rank): v for k, v in tensors.items() if k.startswith("weight/")})
    exported = load_file(run.directory / "export" / "model.safetensors")
    for name, value in exported.items():
        by_rank = sorted(slices.items(), key=lambda item: item[0][1])
        flat = torch.cat([v for (k, _), v in by_rank if k == f"weight/{name}"])
        assert torch.equal(flat.reshape(value.shape), value.float()), name


def test_changed_settings(trains, tmp_path):
    whole = trains("whole", *FLAGS)
    losses = whole.losses
    shutil.copytree(whole.directory, tmp_path / "other")
    again = trains(
        "whole",
        *FLAGS,
        "--resume_from_checkpoint",
        "auto",
        "--max_steps",
        STEPS + 2,
        *"--learning_rate 5e-4 --seed 7 --per_device_train_batch_size 1".split(),
    )
    lines = {
        line.split(" | ")[0].strip(): [c.strip() for c in line.split(" | ")[1:]]
        for line in again.output.splitlines()
        if line.count(" | ") == 3
    }
    assert lines["learning_rate"] == ["0.001", "0.0005", "0.0005"]
    assert lines["seed"] == ["42", "7", "42"]
    assert lines["gradient_accumulation_steps"] == ["2", "2", "4"]
    assert lines["per_device_train_batch_size"] == ["2", "1", "1"]
    assert [s["step"] for s in again.steps] == list(range(1, STEPS + 3))
    assert again.losses[:STEPS] == losses  # what was logged before stays
    wrong = trains("other", *FLAGS, *LORA, "--resume_from_checkpoint", "auto", code=2)
    assert "another model, method or adapter shape" in wrong.output and "not there" in wrong.output


def test_the_printed_command_resumes(trains, tmp_path):
    """Nothing but the run's own resolved configuration."""
    from conftest import ROOT, Run, command

    whole = trains("whole", *FLAGS)
    shutil.rmtree(whole.directory / f"checkpoint-{STEPS}")
    done = command(
        "--config",
        whole.directory / "resolved_config.yaml",
        "--resume_from_checkpoint",
        "auto",
        cwd=ROOT,
    )
    again = Run(done.returncode, done.stdout, whole.directory)
    assert again.code == 0 and f"checkpoint-{CUT}, verified" in again.output, again.output[-3000:]
    assert again.losses == whole.losses


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--resume_from_checkpoint", "checkpoint-9"], "no checkpoint checkpoint-9"),
        (["--save_total_limit", 1], "at least 2"),
    ],
)
def test_refused(trains, flags, words):
    assert words in trains("run", *FLAGS, *flags, code=2).output
