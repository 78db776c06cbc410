"""A loss that is not finite changes no weight, is logged as null, and stops the run."""

import pytest

FLAGS = (
    "--per_device_train_batch_size 2 --lr_scheduler_type constant --eval_strategy no "
    "--eval_on_start false"
).split()


def weights(run):
    from safetensors.torch import load_file

    return load_file(run.directory / "export" / "model.safetensors")


@pytest.mark.parametrize(
    "value, config",
    [
        ("nan", "ds_z3_offload"),
        ("inf", "ds_z3_nvme"),
        pytest.param("inf", "ds_z3_offload", marks=pytest.mark.long),
        pytest.param("nan", "ds_z3_nvme", marks=pytest.mark.long),
    ],
)
def test_no_step_and_null(trains, value, config):
    import torch

    fault = {"FAULT_STEP": "2", "FAULT_VALUE": value}
    flags = [*FLAGS, "--deepspeed", f"{config}.json"]
    clean = trains("clean", *flags, "--max_steps", 1)
    flags += ["--max_steps", 2, "--max_nonfinite_steps", 2]
    skipped = trains("skipped", *flags, env=fault, script="tests/cpu/inject.py")
    assert skipped.losses[0] == clean.losses[0]
    assert skipped.losses[1] is None and skipped.steps[1]["grad_norm"] is None
    for name, tensor in weights(clean).items():
        assert torch.equal(tensor, weights(skipped)[name]), name


def test_goes_on_after_one(trains):
    run = trains(
        "on",
        *FLAGS,
        *"--max_steps 4 --max_nonfinite_steps 2".split(),
        env={"FAULT_STEP": "2", "FAULT_VALUE": "nan"},
        script="tests/cpu/inject.py",
    )
    assert run.losses[1] is None and all(
        loss is not None and loss > 0 for loss in run.losses[:1] + run.losses[2:]
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_stop(trains, ranks):
    # On the second rank only: both must stop, at the same step.
    run = trains(
        "stop",
        *FLAGS,
        "--max_steps",
        5,
        env={"FAULT_STEP": "3", "FAULT_VALUE": "inf", "FAULT_RANK": str(ranks - 1)},
        script="tests/cpu/inject.py",
        ranks=ranks,
        code=1,
    )
    assert run.losses[-1] is None and len(run.losses) == 3 and "last good step was 2" in run.output
    assert not (run.directory / "export").exists()


def test_accumulation_skips_the_whole_step(trains):
    run = trains(
        "accumulate",
        *FLAGS,
        *"--gradient_accumulation_steps 3 --max_steps 2 --max_nonfinite_steps 2".split(),
        env={"FAULT_STEP": "2", "FAULT_VALUE": "nan"},
        script="tests/cpu/inject.py",
    )
    assert run.losses[0] is None and run.losses[1] is not None
