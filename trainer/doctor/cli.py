"""Is this machine ready? Each check says what it found, what is needed and how to fix it. No torch.

Run as: python launch/doctor.py [--json] [--io] [--nvme_path DIR] [--model ORG/NAME]  (make doctor)
"""

import json
import threading
import time
from collections.abc import Callable

from trainer.config.command_line import Parser, command
from trainer.console import answered, say, table
from trainer.distributed import ranks_on_this_machine
from trainer.doctor import build, gpu, network, resources
from trainer.doctor.check import FAILURE, OK, WARNING, Check, Options, from_error
from trainer.errors import DOES_NOT_FIT, DONE, RunError, script_line
from trainer.system import hardware

SECONDS = 17  # that all checks together may take
CheckFunction = Callable[[Options], Check]
CHECKS = [*build.CHECKS, *gpu.CHECKS, *resources.CHECKS, *network.CHECKS]


def examine(options: Options, functions: list[CheckFunction] = CHECKS) -> dict[str, Check]:
    """Run the checks and return {name: check} in their order.

    They run side by side, as some wait for servers, in threads that end with the process: a slow
    server or a hung mount holds up nobody.
    """
    silent = f"no answer in {SECONDS} s"
    fix = "look at what it asks: a server, a mount"
    answers = dict.fromkeys(functions, Check(WARNING, silent, "an answer", fix))

    def run(function: CheckFunction) -> None:
        try:
            answers[function] = function(options)
        except RunError as error:
            answers[function] = from_error(error)
        except Exception as error:  # a check that breaks must not hide the others
            answers[function] = Check(
                WARNING,
                f"could not be checked: {type(error).__name__}: {error}",
                "an answer",
                f"{script_line('doctor')} once more",
            )

    threads = [threading.Thread(target=run, args=[f], daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    until = time.monotonic() + SECONDS
    for thread in threads:
        thread.join(max(0, until - time.monotonic()))
    return {f.__name__.replace("_", " "): answers[f] for f in functions}


def quick(use_gpus: bool, nvme: bool) -> None:
    """Run the QUICK checks before a run on GPUs or not, with NVMe or not.

    They are those that take no time, and that the run does not make itself, more exactly, once it
    knows the model. Prints warnings. Raises RunError where a check fails.
    """
    options = Options(hardware.gpu_count() if use_gpus else 0, ranks_on_this_machine(), nvme)
    for name, check in examine(options, [*gpu.QUICK, *resources.QUICK]).items():
        if check.status == FAILURE:
            raise check.as_error(f"this machine is not ready: {name}")
        if check.status == WARNING:
            say(f"warning: {name}: {check.found}; needed: {check.needed}; fix: {check.fix}")


@command
def main() -> int:
    """Return the exit code of launch/doctor.py: DOES_NOT_FIT where a check failed."""
    parser = Parser(prog="launch/doctor.py", description="Is this machine ready to train?")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--io",
        action="store_true",
        help="measure the NVMe directory too: half a GB, written and read",
    )
    parser.add_argument(
        "--nvme", action="store_true", help="what the NVMe configurations need is needed"
    )
    parser.add_argument("--nvme_path", help=f"the NVMe directory (default: {Options.nvme_path})")
    parser.add_argument("--model", help="a model on the hub that has to be readable: ORG/NAME")
    options = parser.parse_args(namespace=Options(hardware.gpu_count()))
    checks = examine(options)
    statuses = [check.status for check in checks.values()]
    if options.json:
        print(json.dumps([{"name": name, **vars(c)} for name, c in checks.items()], indent=1))
    else:
        rows = [(check.status, name, check.found) for name, check in checks.items()]
        print(table([("", "check", "found"), *rows], "  "))
        for name, check in checks.items():
            if check.status != OK:
                print(f"\n{check.as_error(f'{check.status}: {name}')}")
        print(f"\n{statuses.count(FAILURE)} failure(s), {statuses.count(WARNING)} warning(s)")
    return answered(DOES_NOT_FIT if FAILURE in statuses else DONE)
