"""docs/models.md: which model family does what, as measured. It is read back and written here."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.files import write_atomically
from tests.families.configs import FAMILIES

COLUMNS = ("plan", "full", "lora", "experts", "nvme", "packing", "export", "liger")
# The columns that one run may measure, by the column that names the run.
RUNS = {"run": COLUMNS[:-1], "GPU run": COLUMNS[-1:]}
NOT_MEASURED, NO_EXPERTS, NO_RUN = "not measured", "no experts", "-"
EXACT, REFUSED, FAILED = "exact", "refused", "FAILED"  # a measured cell begins with one
STEPS = 9  # optimizer steps of a run; the first has a learning rate of 0
# fp32 sums in another order. With weights as wide as these, a wrong mask or loss is off by 0.01.
TOLERANCE = 1e-4

HEAD = """# Models

What each model family does, measured. `make test-families` writes this page: what is changed by
hand is lost.

A tiny model of each family, with random weights and every kind of layer of that family, is trained
by `launch/train.py` (ZeRO-3 with offload, fp32, CPU) for {steps} optimizer steps. A loop of plain
PyTorch trains the same model of transformers: AdamW, the same rows, clipping and schedule. A family
is transformers' `model_type`. Another one is trained too: the checks of a run's start are the same.

- *exact (d)*: d is the largest distance. Up to {tolerance:g} is exact: sums in another order.
  *refused*: the run ends with exit code 2 before a step, and says this. *FAILED*: a fault.
- *plan*: `launch/plan.py` knows the model, and its number of parameters is the model's.
- *full*, *lora*: losses, norms of gradients (relative) and final weights. LoRA is on `all-linear`.
- *experts*: the same with `--lora_target_modules experts`, and the merged model's logits.
- *nvme*: as *full*, with parameters and optimizer on NVMe.
- *packing*: as *full*, with packed rows. The loop has the same samples one by one.
- *export*: names, types and shapes of the tensors are those that transformers saves. It loads the
  exported model and the merged one, with nothing missing or left over. The merged one's logits are
  the loop's, the exported one's those of the loop's model with its weights (relative to the
  largest).
- *liger*: losses on a GPU with Liger's kernels beside those without, full and LoRA, fp32.

"""


@dataclass
class Matrix:
    """rows: {family: {column: text}}. runs: what was run.

    measured: {family: {column of RUNS: the runs that measured it, as indices}}.
    """

    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    measured: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    def with_rows(self, rows: dict[str, dict[str, str]], run: str) -> "Matrix":
        """Return the matrix with the cells that a run measured; other cells stay.

        rows: {family: {column: text}}. run: date, versions and command.
        """
        new = copy.deepcopy(self)
        new.runs.append(run)
        for family, cells in rows.items():
            row, runs = new.rows.setdefault(family, {}), new.measured.setdefault(family, {})
            known = {column: text for column, text in cells.items() if text != NOT_MEASURED}
            for name, columns in RUNS.items():
                if known.keys() & set(columns):
                    older = [c for c in columns if row.get(c, NOT_MEASURED) != NOT_MEASURED]
                    # Earlier runs are named as long as a cell of theirs may be left.
                    earlier = runs.get(name, []) if set(older) - known.keys() else []
                    runs[name] = [*earlier, len(new.runs) - 1]
            row.update(known)
        return new


def failed(rows: dict[str, dict[str, str]]) -> list[str]:
    """Return "family column" of each cell that is neither exact nor refused."""
    return [
        f"{family} {column}"
        for family, cells in rows.items()
        for column, text in cells.items()
        if text.startswith(FAILED)
    ]


def refused_now(before: dict[str, dict[str, str]], rows: dict[str, dict[str, str]]) -> list[str]:
    """Return "family column" of each cell that was exact before and is refused in `rows`."""
    return [
        f"{family} {column}"
        for family, cells in rows.items()
        for column, text in cells.items()
        if text.startswith(REFUSED) and before.get(family, {}).get(column, "").startswith(EXACT)
    ]


def cell(text: str) -> str:
    """Return a text that fits into a cell of a table."""
    return " ".join(text.replace("|", "/").split())


def read(path: Path) -> Matrix:
    """Return the matrix of a page, empty where there is none."""
    matrix = Matrix()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        if match := re.fullmatch(r"\d+\. (.*)", line):
            matrix.runs.append(match[1])
        elif match := re.fullmatch(r"\| `(\w+)` \| (.*) \|", line):
            cells = match[2].split(" | ")
            matrix.rows[match[1]] = dict(zip(COLUMNS, cells))
            matrix.measured[match[1]] = {
                name: [int(number) - 1 for number in numbers.split(", ")]
                for name, numbers in zip(RUNS, cells[len(COLUMNS) :])
                if numbers != NO_RUN
            }
    return matrix


def _order(family: str) -> tuple[int, str]:
    known = list(FAMILIES)
    return (known.index(family) if family in known else len(known)), family


def render(matrix: Matrix) -> str:
    """Return the page. Runs of which no cell is left are not on it."""
    used = sorted({i for runs in matrix.measured.values() for part in runs.values() for i in part})
    header = ["family", *COLUMNS, *RUNS]
    lines = [_line(header), _line(["---"] * len(header))]
    for family in sorted(matrix.rows, key=_order):
        cells = [cell(matrix.rows[family].get(column, NOT_MEASURED)) for column in COLUMNS]
        runs = [matrix.measured[family].get(name, []) for name in RUNS]
        numbers = [", ".join(str(used.index(i) + 1) for i in part) or NO_RUN for part in runs]
        lines.append(_line([f"`{family}`", *cells, *numbers]))
    lines += ["", "Runs:", ""]
    lines += [f"{number}. {cell(matrix.runs[i])}" for number, i in enumerate(used, 1)]
    return HEAD.format(steps=STEPS, tolerance=TOLERANCE) + "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write(matrix: Matrix, path: Path) -> None:
    """Write the page, whole or not at all."""
    write_atomically(path, render(matrix))
