"""W&B: whether it knows the user, what it is sent, and that it never stops a run."""

import math
import os
import sys
import threading

import pytest

from trainer.doctor.network import logged_in
from trainer.monitor import tracking
from trainer.monitor.tracking import Tracker
from trainer.run_dir import RunDirectory


@pytest.mark.parametrize(
    "url, host, known",
    [
        ("", "api.wandb.ai", True),
        ("", "api.forge.coreweave.com", True),
        ("", "example.org", False),
        ("https://wandb.example.org/x", "wandb.example.org", True),
        ("https://wandb.example.org/x", "api.wandb.ai", False),
    ],
)
def test_the_key_in_netrc(tmp_path, monkeypatch, url, host, known):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {'0' * 40}\n")
    assert logged_in() == known


class Wandb:
    """A wandb module with one run. broken: names of functions that raise."""

    def __init__(self, folder, *broken):
        self.folder, self.broken = folder, broken
        self.modes, self.records, self.finished = [], [], False

    def Settings(self, **values):
        return values

    def init(self, mode, **options):
        self.modes.append(mode)
        self.offline, self.options = mode == "offline", options
        if "init" in self.broken or f"init {mode}" in self.broken:
            raise RuntimeError("no such\n  project")
        self.dir = str(self.folder / "wandb" / "offline-run-1" / "files")
        return self

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, record):
        if "log" in self.broken:
            raise ConnectionError("lost")
        self.records.append(record)

    def finish(self):
        if "finish" in self.broken:
            raise ConnectionError("lost")
        self.finished = True


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(mode, *broken) → (Tracker, the fake wandb)."""

    def go(mode, *broken):
        wandb = Wandb(tmp_path, *broken)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        monkeypatch.setenv("WANDB_MODE", mode)
        monkeypatch.setenv("WANDB_SILENT", "true")
        return Tracker(RunDirectory(tmp_path), "name", {"seed": 1}), wandb

    for variable in ("WANDB_DIR", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("RANK", "0")
    return go


def test_numbers_have_groups_and_offline_runs_say_how_to_upload(start, tmp_path, capsys):
    tracker, wandb = start("offline")
    assert wandb.options["dir"] == str(tmp_path) and wandb.options["name"] == "name"
    assert wandb.options["config"] == {"seed": 1}
    record = {
        "step": 3,
        "loss": 0.12345678,
        "eval_loss": math.nan,
        "eval_token_accuracy": 0.5,
        "gpu_mem_gib": 7,
        "nvme_read_gbps": 2.0,
        "step_s": 1.0,
        "grad_norm": None,
        "epoch": 0.1,
    }
    tracker.log(record)
    assert wandb.records == [
        {
            "train/global_step": 3,
            "train/loss": 0.123457,
            "eval/token_accuracy": 0.5,
            "mem/gpu_mem_gib": 7,
            "io/nvme_read_gbps": 2.0,
            "perf/step_s": 1.0,
        }
    ]
    tracker.finish()
    assert wandb.finished
    line = f"W&B ran offline; to upload: wandb sync {tmp_path / 'wandb' / 'offline-run-1'}"
    assert line in capsys.readouterr().out


def test_online_runs_say_nothing(start, capsys):
    tracker, wandb = start("online")
    tracker.finish()
    assert wandb.modes == ["online"] and wandb.finished and capsys.readouterr().out == ""


def test_without_a_server_it_goes_offline(start, capsys):
    tracker, wandb = start("online", "init online")
    tracker.log({"step": 1, "loss": 1.0})
    tracker.finish()
    output = capsys.readouterr().out
    assert wandb.modes == ["online", "offline"] and len(wandb.records) == 1
    assert "W&B: RuntimeError: no such project\n" in output and "wandb sync" in output


def test_a_failing_init_stops_nothing(start, capsys):
    tracker, wandb = start("online", "init")
    tracker.log({"step": 1, "loss": 1.0})
    tracker.finish()
    assert not wandb.records and not wandb.finished
    assert "W&B did not start; the run goes on without it" in capsys.readouterr().out


def test_an_init_that_hangs_is_left_alone(start, monkeypatch, capsys):
    never = threading.Event()
    monkeypatch.setattr(tracking, "INIT_TIMEOUT", -4.9)
    monkeypatch.setattr(Wandb, "init", lambda self, **options: never.wait(10) and self)
    tracker, _ = start("online")
    tracker.log({"step": 1})
    assert "W&B did not start" in capsys.readouterr().out
    never.set()


def test_a_failing_log_and_finish_stop_nothing(start, capsys):
    tracker, _ = start("online", "log", "finish")
    tracker.log({"step": 1, "loss": 1.0})
    tracker.finish()
    assert capsys.readouterr().out.count("W&B: ConnectionError: lost") == 2


def test_without_the_package_nothing_stops(start, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import raises
    monkeypatch.setenv("WANDB_MODE", "offline")
    Tracker(RunDirectory("x"), "name", {}).log({"step": 1})
    assert "W&B did not start" in capsys.readouterr().out


def test_disabled(start, capsys):
    tracker, wandb = start("disabled")
    tracker.log({"step": 1})
    tracker.finish()
    assert not wandb.modes and capsys.readouterr().out == ""


@pytest.mark.skipif(os.getuid() != 0, reason="gives a link to another user")
def test_another_users_link_is_not_followed(start, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "wandb").symlink_to(tmp_path / "elsewhere")
    tracker, wandb = start("offline")
    assert wandb.modes == ["offline"], "one's own leads where it is meant to"
    os.lchown(tmp_path / "wandb", 4711, 4711)
    _, wandb = start("offline")
    assert not wandb.modes and "another user's link: remove it" in capsys.readouterr().out
