"""What a check of the doctor is asked and what it answers. Imports the standard library only."""

from dataclasses import dataclass

from trainer.config.flags import RUN_ARGUMENTS
from trainer.errors import DOES_NOT_FIT, RunError

OK, WARNING, FAILURE = "ok", "warning", "failure"
GB, GIB = 1e9, 2**30


@dataclass
class Options:
    """What the machine has to be ready for: the flags of launch/doctor.py, and what a run knows.

    gpus: CUDA devices that are used. ranks: processes on this machine; None where no run is known.
    nvme: weights or states are on NVMe. io: measure the disk. model: a hub model to be readable.
    """

    gpus: int
    ranks: int | None = None
    nvme: bool = False
    nvme_path: str = RUN_ARGUMENTS["nvme_path"][0]
    io: bool = False
    model: str | None = None
    json: bool = False


@dataclass
class Check:
    """The answer of one check.

    status: ok; warning: a run would be slower or lack something; failure: it would not start, or
    not be right.
    """

    status: str
    found: str
    needed: str = ""
    fix: str = ""

    def as_error(self, what: str) -> RunError:
        """Return an error with what was found, what is needed and the fix."""
        return RunError(what, found=self.found, needed=self.needed, fix=self.fix, code=DOES_NOT_FIT)


def judge(good: bool, found: str, needed: str, fix: str, fatal: bool = False) -> Check:
    """Return a check that is ok where `good`, else a warning; a failure where it is fatal."""
    if good:
        return Check(OK, found, needed)
    return Check(FAILURE if fatal else WARNING, found, needed, fix)


def from_error(error: RunError, fatal: bool = True) -> Check:
    """Return the error as a failure, or as a warning."""
    found = f"{error.what}: {error.found}" if error.found else error.what
    return judge(False, found, str(error.needed or ""), error.fix or "", fatal)
