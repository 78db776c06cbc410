"""Train tiny models of many families beside plain PyTorch, and write docs/models.md.

python tests/families/run.py [--only llama,gemma2] [--columns full,lora] [--jobs 2]
(make test-families)

A row is printed, and goes into the page, as soon as it is known. Rows of other families stay, and
so do cells that were not measured. The exit code is 1 where a cell is neither exact nor refused,
or is refused and was exact.
--results keeps what was measured as JSON, and --merge takes such a file in: measured on a machine
with a GPU, it fills the column of Liger's kernels.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from data.files import write_atomically  # noqa: E402
from tests.families import matrix  # noqa: E402
from tests.families.configs import FAMILIES  # noqa: E402
from trainer.errors import DONE, FAILED  # noqa: E402
from trainer.run_dir import versions  # noqa: E402

Cells = dict[str, str]
Measure = Callable[[str, list[str], Path], Cells]
PAGE = ROOT / "docs" / "models.md"


def measure_one(family: str, columns: list[str], folder: Path) -> Cells:
    """Measure a family in a process of its own, so that nothing can end the others."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        try:
            return process.submit(_measure, family, columns, folder).result()
        except Exception as error:
            return dict.fromkeys(columns, f"{matrix.FAILED}: {type(error).__name__}: {error}")


def _measure(family: str, columns: list[str], folder: Path) -> Cells:
    folder.mkdir(parents=True)
    tempfile.tempdir = str(folder)  # also of what the tests' conftest makes when it is imported
    from tests.families.measure import measure

    return measure(family, columns, folder)


def measure_all(
    families: list[str], columns: list[str], jobs: int, folder: Path, measure: Measure
) -> Iterator[tuple[str, Cells, float]]:
    """Yield (family, cells, seconds) as they come, `jobs` families at a time."""

    def timed(family: str) -> tuple[str, Cells, float]:
        began = time.monotonic()
        cells = measure(family, columns, folder / family)
        return family, cells, time.monotonic() - began

    with ThreadPoolExecutor(jobs) as threads:
        for done in as_completed([threads.submit(timed, family) for family in families]):
            yield done.result()


def chosen(text: str | None, known: Any, what: str) -> list[str]:
    """Return the names of a comma-separated list, or all."""
    names = text.replace(",", " ").split() if text else list(known)
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"error: unknown {what}: {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def described(args: argparse.Namespace) -> str:
    """Return the date, the machine, the versions and the command of this run."""
    packages = versions()
    names = ("torch", "transformers", "deepspeed", "peft", "liger-kernel")
    known = ", ".join(f"{name} {packages[name]}" for name in names if packages.get(name))
    # Without the flags that name files.
    flags = [f"--{flag} {getattr(args, flag)}" for flag in ("only", "columns")]
    flags = [flag for flag in flags if not flag.endswith(" None")]
    command = f'make test-families ARGS="{" ".join(flags)}"' if flags else "make test-families"
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return f"{time.strftime('%Y-%m-%d')}, {machine}, {known}: `{command}`"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAMES", help=f"families: {', '.join(FAMILIES)}")
    parser.add_argument("--columns", metavar="NAMES", help=f"of {', '.join(matrix.COLUMNS)}")
    parser.add_argument("--jobs", type=int, default=2, help="families at a time")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--results", type=Path, metavar="FILE", help="the cells, as JSON")
    parser.add_argument("--output", type=Path, default=PAGE, metavar="FILE.md")
    parser.add_argument("--folder", type=Path, help="keep models, runs and logs there")
    parser.add_argument("--merge_only", action="store_true", help="measure nothing")
    return parser.parse_args(argv)


def main(argv: list[str], measure: Measure = measure_one) -> int:
    """Return the exit code. measure: what measures a family."""
    args = parse(argv)
    families = chosen(args.only, FAMILIES, "family")
    columns = chosen(args.columns, matrix.COLUMNS, "column")
    run, rows, began = described(args), {}, time.monotonic()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="families-"))
    # The runs share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    before = matrix.read(args.output)
    for file in args.merge:
        other = json.loads(file.read_text(encoding="utf-8"))
        before = before.with_rows(other["rows"], other["run"])
        matrix.write(before, args.output)
    work = [] if args.merge_only else families
    for family, cells, seconds in measure_all(work, columns, args.jobs, folder, measure):
        rows[family] = cells
        shown = " | ".join(f"{column} {text}" for column, text in cells.items())
        print(f"{family} ({seconds:.0f} s): {shown}", flush=True)
        # After each row: what is known stays, however this ends.
        minutes = (time.monotonic() - began) / 60
        measured = f"{run}, {minutes:.0f} min"
        matrix.write(before.with_rows(rows, measured), args.output)
        if args.results:
            write_atomically(args.results, json.dumps({"run": measured, "rows": rows}, indent=1))
    failed = matrix.failed(rows)
    print(f"\n{args.output}: {len(rows)} rows measured, {len(failed)} cells failed")
    if failed:
        print(f"failed: {', '.join(failed)}; logs: {folder}")
    elif not args.folder:
        shutil.rmtree(folder, ignore_errors=True)
    worse = matrix.refused_now(before.rows, rows)
    if worse:
        print(f"exact before, refused now: {', '.join(worse)}")
    return FAILED if failed or worse else DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
