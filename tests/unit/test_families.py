"""docs/models.md: how it is written and read back; and the table of tiny models behind it."""

import json
import re

import pytest

from tests.families import matrix, run
from tests.families.configs import COMMON, FAMILIES, config_of
from trainer.errors import DONE, FAILED

FIRST = {
    "llama": {"plan": "exact", "full": "exact (2e-07)", "liger": matrix.NOT_MEASURED},
    "falcon_h1": {
        "full": "FAILED: loss of step 1 (1.9168) off by 4.4e+00",
        "packing": "refused: a",
    },
}


def page(folder, *changes):
    """Write the cells of several runs one after the other. Return the page's path."""
    path = folder / "models.md"
    for number, rows in enumerate(changes, 1):
        matrix.write(matrix.read(path).with_rows(rows, f"run {number}"), path)
    return path


def test_read_back(tmp_path):
    path = page(tmp_path, FIRST)
    again = matrix.read(path)
    assert again.rows["llama"]["full"] == "exact (2e-07)"
    assert again.rows["llama"]["experts"] == matrix.NOT_MEASURED
    assert again.runs == ["run 1"] and again.measured["llama"] == {"run": [0]}
    assert matrix.render(again) == path.read_text()


def test_new_cells_replace_those_of_the_same_family_only(tmp_path):
    path = page(tmp_path, FIRST, {"llama": {"full": "exact (5e-07)"}})
    found = matrix.read(path)
    assert found.rows["llama"]["full"] == "exact (5e-07)" and found.rows["llama"]["plan"] == "exact"
    assert found.rows["falcon_h1"]["full"] == FIRST["falcon_h1"]["full"]
    # The plan's cell is of the first run still.
    assert found.measured == {"llama": {"run": [0, 1]}, "falcon_h1": {"run": [0]}}


def test_runs_without_a_cell_are_dropped(tmp_path):
    both = {family: dict.fromkeys(matrix.COLUMNS[:-1], "exact (1e-07)") for family in FIRST}
    path = page(tmp_path, FIRST, both)
    assert matrix.read(path).runs == ["run 2"] and "run 1" not in path.read_text()


def test_a_gpu_result_outlives_runs_without_a_gpu(tmp_path):
    path = page(tmp_path, FIRST, {"llama": {"liger": "exact (3e-06)"}}, FIRST)
    found = matrix.read(path)
    assert found.rows["llama"]["liger"] == "exact (3e-06)"
    assert found.measured["llama"] == {"run": [1], "GPU run": [0]}
    assert found.runs == ["run 2", "run 3"]


def test_a_text_cannot_break_the_table(tmp_path):
    path = page(tmp_path, {"llama": {"full": "FAILED: a | b\nc"}})
    assert matrix.read(path).rows["llama"]["full"] == "FAILED: a / b c"


def test_families_keep_the_order_of_the_table_and_unknown_ones_come_last(tmp_path):
    path = page(tmp_path, {name: {"full": "exact"} for name in ("zebra", "gpt2", "llama")})
    assert re.findall(r"^\| `(\w+)`", path.read_text(), re.MULTILINE) == ["llama", "gpt2", "zebra"]


# -- the command -----------------------------------------------------------------------------------
def measured(family, columns, folder):
    """Stand for a family's runs: Falcon-H1 fails."""
    text = "FAILED: loss off by 4.4" if family == "falcon_h1" else "exact (1e-07)"
    return dict.fromkeys(columns, text)


def go(tmp_path, *flags):
    return run.main(["--output", str(tmp_path / "models.md"), *flags], measure=measured)


def test_a_fault_is_written_and_ends_with_1(tmp_path, capsys):
    assert go(tmp_path, "--only", "llama,falcon_h1", "--columns", "full") == FAILED
    found = matrix.read(tmp_path / "models.md")
    assert found.rows["falcon_h1"]["full"].startswith("FAILED")
    assert found.rows["llama"]["full"] == "exact (1e-07)"
    assert "falcon_h1 full" in capsys.readouterr().out
    assert 'make test-families ARGS="--only llama,falcon_h1 --columns full"`' in found.runs[0]
    assert str(tmp_path) not in found.runs[0]


def test_a_cell_that_is_refused_and_was_exact_ends_with_1_once(tmp_path, capsys):
    def refuses(family, columns, folder):
        return dict.fromkeys(columns, "refused: not any more")

    flags = ["--output", str(tmp_path / "models.md"), "--only", "gpt2", "--columns", "full"]
    assert run.main(flags, measure=refuses) == DONE  # it never was exact
    assert run.main(flags, measure=measured) == DONE
    assert run.main(flags, measure=refuses) == FAILED
    assert "exact before, refused now: gpt2 full" in capsys.readouterr().out
    assert run.main(flags, measure=refuses) == DONE  # the page says so now


def test_results_are_merged(tmp_path):
    results = tmp_path / "gpu.json"
    assert go(tmp_path, "--only", "llama", "--columns", "liger", "--results", str(results)) == DONE
    assert json.loads(results.read_text())["rows"] == {"llama": {"liger": "exact (1e-07)"}}
    other = tmp_path / "other"
    other.mkdir()
    assert go(other, "--only", "gpt2", "--columns", "full", "--merge", str(results)) == DONE
    found = matrix.read(other / "models.md")
    assert found.rows["llama"]["liger"] == found.rows["gpt2"]["full"] == "exact (1e-07)"


def test_what_was_measured_stays_when_a_later_family_ends_the_command(tmp_path):
    def breaks(family, columns, folder):
        if family == "gpt2":
            raise KeyboardInterrupt
        return measured(family, columns, folder)

    with pytest.raises(KeyboardInterrupt):
        flags = ["--only", "llama,gpt2", "--columns", "full", "--jobs", "1"]
        run.main(["--output", str(tmp_path / "models.md"), *flags], measure=breaks)
    assert matrix.read(tmp_path / "models.md").rows["llama"]["full"] == "exact (1e-07)"


def test_names_that_are_not_there(tmp_path):
    for flags in (["--only", "lama"], ["--columns", "fulll"]):
        with pytest.raises(SystemExit, match="unknown"):
            go(tmp_path, *flags)


# -- the table -------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_configurations_are_tiny_and_of_their_family(family):
    config = config_of(family)
    assert config.model_type == family
    assert config.vocab_size == COMMON["vocab_size"] and config.hidden_size == COMMON["hidden_size"]
    assert config.num_hidden_layers <= 4
    # Every field of the table is one of the class: a wrong name would change nothing. Some models
    # read a head_dim that their class does not declare.
    known = type(config)()
    assert [name for name in {*FAMILIES[family]} - {"head_dim"} if not hasattr(known, name)] == []
