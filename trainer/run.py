"""One run from flags to exported model: a table of contents of named stages.

`main` is what launch/train.py calls. What a stage needs, it takes: the order follows from that.
"""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from trainer.checkpoint import resume
from trainer.config.flags import help_text
from trainer.config.settings import resolve
from trainer.console import (
    answered,
    drop_when_blocked,
    guard_output,
    report,
    say,
    tell_at_once,
    to_stderr,
    use_utf8,
)
from trainer.distributed import is_main_process
from trainer.errors import CRASHED, DONE, FAILED, STOPPED, RunError, one_line
from trainer.prepare import Prepared, prepare
from trainer.process_group import join
from trainer.run_dir import RunDirectory
from trainer.system import user

if TYPE_CHECKING:
    from trainer.stages import Run

_EARLY = "stopped before the first optimizer step"


# -- what launch/train.py calls ----------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code of a run. Bad input ends before torch is imported, where it can."""
    if argv is None:
        use_utf8()
    guard_output()
    argv = sys.argv[1:] if argv is None else argv
    if any(word in ("-h", "--help") for word in argv):
        print(help_text())
        return answered(DONE)
    drop_when_blocked()
    if "ZERO_OFFLOAD_SUPERVISED" not in os.environ:  # a supervisor says it in its ranks' place
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, _stopped_early)

    def from_flags() -> int:
        user.prepare()
        prepared = prepare(resolve(argv))
        return train(prepared)

    return _guarded(from_flags)


def leave(code: int) -> None:
    """End the process with this code.

    The interpreter's own end stops the threads of gloo and libaio in any order, which at times
    aborts and turns the code, which is a promise, into another.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _guarded(stage: Callable[[], int], run: RunDirectory | None = None) -> int:
    """Return the stage's exit code; an error is printed, once for all ranks, and becomes its code.

    run: set once the run directory is ours; then it is said how the run goes on.
    """
    try:
        return stage()
    except RunError as error:
        if report(error) and error.code == FAILED:
            _say_how_to_resume(run)
        return error.code
    except KeyboardInterrupt:
        say(f"\n{_EARLY}{_how_to_begin()}")
        return STOPPED
    except Exception:
        traceback.print_exc()
        if is_main_process():
            _say_how_to_resume(run)
        # A supervisor tries again after an unforeseen failure, and not after a refusal.
        return CRASHED if os.environ.get("ZERO_OFFLOAD_SUPERVISED") else FAILED


def _stopped_early(number: int, frame: object) -> None:
    """End the process for a signal that comes before PreemptionCallback takes them."""
    if is_main_process():
        tell_at_once(f"\n{signal.Signals(number).name}: {_EARLY}{_how_to_begin()}\n")
    os._exit(STOPPED)


def _how_to_begin() -> str:
    """Return what is left to say where no supervisor does: the line that starts the run again."""
    if "ZERO_OFFLOAD_SUPERVISED" in os.environ:
        return ""
    return f"\nto go on: {resume.from_here([sys.executable, *sys.argv])}"


def _say_how_to_resume(run: RunDirectory | None) -> None:
    """Name the last checkpoint of a run that failed, and the line that resumes it."""
    if run is not None and run.is_ours() and (last := resume.newest(run.path)) is not None:
        how = resume.command(run)
        to_stderr(f"the last checkpoint is of step {last}; to go on from it: {how}")


# -- the run -----------------------------------------------------------------------------------
def train(prepared: Prepared) -> int:
    """Train, evaluate, export. Returns the exit code."""
    # torch 2.13 renamed collectives that DeepSpeed 0.19.8 calls; the user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    ranks = join(prepared.config, prepared.gpu, prepared.fetch_ahead)
    from trainer.stages import open_run

    run = open_run(prepared, ranks)
    return _guarded(lambda: _train(run), run.directory)


def _train(run: "Run") -> int:
    """Run the stages, once the run directory is ours."""
    import torch

    from trainer import build, finish, stages
    from trainer.monitor import stopping

    saved = stages.find_checkpoint(run)
    run.settings.freeze()
    inputs = stages.load_inputs(run)
    plan = stages.plan_engine(run, inputs, saved)
    stages.check_weights(run, inputs)
    arguments = stages.training_arguments(run, inputs, plan, saved)
    stages.show_settings(run)
    at_once = saved is None or run.is_new
    if at_once:
        stages.write_run_files(run, inputs, arguments, saved)
    prediction = stages.predict(run, inputs, plan)
    try:
        with ExitStack() as resources:
            space = stages.reserve_swap_space(run, plan, resources)
            parts = build.RunParts(run, inputs, plan, arguments, saved, space)
            trainer = build.build_trainer(parts, resources)
            if not at_once:
                stages.write_run_files(run, inputs, arguments, saved)
            trainer.train(resume_from_checkpoint=str(saved.folder) if saved else None)
            trainer.check_directory()
            if code := stopping.exit_code(trainer):
                return code
            if code := finish.finish(run, trainer, prediction, space):
                return code
    except torch.OutOfMemoryError as error:
        raise RunError(
            "the GPU is out of memory",
            found=one_line(error, 200),
            fix="a smaller --per_device_train_batch_size or --max_length, --kept_layers 0, "
            "--kept_weights 0, "
            "--gradient_checkpointing true, or a configuration that offloads more",
            code=FAILED,
        ) from None
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return DONE
