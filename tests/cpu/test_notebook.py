"""launch/notebooks/quickstart.ipynb: every cell runs, and no output is committed.

A step that fails stops it with the program's message.
"""

import json

import pytest
from conftest import ROOT

PATH = ROOT / "launch" / "notebooks" / "quickstart.ipynb"
STEPS = 2


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """executed(model) → the notebook after a run in its own folder.

    Its training run is below tmp_path / "runs".
    """
    import nbformat
    from nbclient import NotebookClient

    def go(model):
        for name, value in {
            "QUICKSTART_MODEL": model,
            "QUICKSTART_STEPS": STEPS,
            "QUICKSTART_RUNS": tmp_path / "runs",
            "DS_ACCELERATOR": "cpu",
            "IPYTHONDIR": tmp_path / "ipython",
        }.items():
            monkeypatch.setenv(name, str(value))
        notebook = nbformat.read(PATH, as_version=4)
        NotebookClient(
            notebook,
            timeout=300,
            kernel_name="python3",
            resources={"metadata": {"path": str(PATH.parent)}},
        ).execute()
        return notebook

    return go


def code(notebook):
    """{id: cell} of the cells with code."""
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def printed(cell):
    """What a cell wrote to stdout and stderr."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_committed():
    import nbformat

    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(
        not cell.outputs and cell.execution_count is None for cell in code(notebook).values()
    )
    assert PATH.read_text() == nbformat.writes(notebook) + "\n"  # as Jupyter saves it


def test_every_cell(executed, tiny_model, tmp_path):
    cells = code(executed(tiny_model))
    outputs = [output for cell in cells.values() for output in cell.outputs]
    assert all(cell.execution_count for cell in cells.values())
    assert not [output for output in outputs if output.output_type == "error"]
    # Lengths, memory, curves, and the plan beside the run.
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    (run,) = (tmp_path / "runs").iterdir()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (
        len([r for r in records if "loss" in r]) == STEPS
        and len([r for r in records if "eval_loss" in r]) >= 2
    )
    assert "2,400 rows" in printed(cells["check"])
    assert f"done: {STEPS} optimizer steps" in printed(cells["train-run"])
    assert all(word in printed(cells["answer"]) for word in ("question: ", "before: ", "after: "))


def test_a_failing_step_stops_it(executed, tmp_path):
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError) as error:
        executed("/nowhere/model")
    assert "ended with exit code 2" in str(
        error.value
    ) and "error: no model directory /nowhere/model" in str(error.value)
    assert not (tmp_path / "runs").exists()
