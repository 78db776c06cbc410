"""Exit 0 means: the last state is finite and on disk. Whatever is logged, saved or exported."""

import pytest

OFFLOAD = ["--deepspeed", "ds_z3_offload.json"]
INJECT = "tests/cpu/inject.py"


def alone(starts, name, *flags, code=1, **options):
    return starts(name, *flags, supervised=False, **options).ends(code)


def spoilt(starts, step, fault, *flags):
    """A run with a fault in the loss of a step. It must end with 1 and export nothing."""
    run = alone(
        starts,
        "run",
        *(*OFFLOAD, *flags, "--export", "true"),
        script=INJECT,
        env={"FAULT_STEP": str(step), "FAULT_VALUE": fault},
    )
    assert not (run.directory / "export").exists()
    return run


@pytest.mark.parametrize("logging", [pytest.param("no", marks=pytest.mark.quick), "epoch", "steps"])
def test_not_finite_whatever_is_logged(starts, logging, row):
    flags = ["--max_steps", 4, "--logging_strategy", logging, "--logging_steps", 3]
    run = spoilt(starts, 2, "nan", *flags)
    assert "not finite in 1 optimizer step" in run.output and "step 2" in run.output
    row(f"NaN in a step, --logging_strategy {logging}", "stops at that step, no export, exit 1")


def test_the_last_step_is_not_finite(starts, row):
    run = spoilt(starts, 3, "inf", "--max_steps", 3, "--logging_strategy", "no")
    assert "the last good step was 2" in run.output
    row("infinity in the last step", "no export, exit 1")


def test_an_infinite_loss_with_finite_gradients(starts, row):
    run = spoilt(starts, 2, "+inf", "--max_steps", 3, "--save_strategy", "no")
    assert "not finite in 1 optimizer step" in run.output and "step 2" in run.output
    row("an infinite loss whose gradients are finite", "stops at that step, no export, exit 1")


def test_all_steps_are_skipped(starts, row):
    """--max_nonfinite_steps allows each of them; the model would be exported as it was."""
    run = spoilt(starts, 1, "nan", "--max_steps", 1, "--max_nonfinite_steps", 9)
    assert "no optimizer step changed the weights" in run.output, run.output[-3000:]
    # Its checkpoint has the weights that it began with.
    flags = ["--max_steps", 1, "--export", "true", "--resume_from_checkpoint", "auto"]
    run = alone(starts, "run", *OFFLOAD, *flags)
    assert "no optimizer step changed the weights" in run.output, run.output[-3000:]
    assert not (run.directory / "export").exists()
    row("every step is skipped, and it is resumed", "no export, exit 1")


@pytest.mark.parametrize(
    "config", ["ds_z3", "ds_z3_offload", pytest.param("ds_z3_nvme", marks=pytest.mark.quick)]
)
def test_weights_that_are_not_finite(starts, config, row):
    """A rate beyond fp32: the one step is made, its loss and gradients were finite."""
    run = alone(
        starts,
        "run",
        *("--deepspeed", f"{config}.json", "--max_steps", 1, "--save_strategy", "no"),
        *("--learning_rate", 1e39, "--lr_scheduler_type", "constant", "--export", "true"),
        *("--validation_split", 0),
    )
    assert "the weights are not finite after step 1: " in run.output, run.output[-3000:]
    assert not (run.directory / "export").exists()
    row(f"weights that are not finite, {config}", "neither saved nor exported, exit 1")


def test_weights_that_are_not_finite_are_not_saved(starts, row):
    run = alone(
        starts,
        "run",
        *OFFLOAD,
        *("--max_steps", 2, "--save_steps", 1, "--learning_rate", 1e39),
        *("--lr_scheduler_type", "constant"),
    )
    assert "the weights are not finite: weight of " in run.output
    assert not list(run.directory.glob("checkpoint-*"))
    row("weights that are not finite, at a save", "no checkpoint of them, exit 1")


@pytest.mark.quick
def test_an_evaluation_that_is_not_finite(starts, tiny_model, tmp_path, row):
    """The model is broken from the start: one weight of its head is infinite."""
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][5, 5] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    run = alone(
        starts,
        "run",
        *OFFLOAD,
        *("--model_name_or_path", broken, "--max_steps", 1, "--eval_on_start", "true"),
        *("--eval_strategy", "steps", "--save_strategy", "no"),
    )
    assert "the validation loss is not finite after step 0" in run.output, run.output[-3000:]
    row("an evaluation that is not finite", "exit 1, with the last checkpoint")


def test_the_last_save_fails(starts, disk, row):
    """The first one fits, the last one does not. No other weights are on disk."""
    place = disk(70)
    run = alone(
        starts,
        "run",
        *OFFLOAD,
        *("--max_steps", 2, "--save_steps", 1),
        directory=place / "run",
    )
    assert "checkpoint-2 was not saved" in run.output
    assert "the last checkpoint could not be saved" in run.output
    assert "on disk: " in run.output and "checkpoint-1" in run.output.split("on disk: ")[1]
    row("the last save fails", "exit 1, with what stands on disk")
