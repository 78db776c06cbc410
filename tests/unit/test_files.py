"""How a file or a directory becomes visible whole (data/files.py)."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

from data import files

FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def fill(place):
    """What a writer of a model does: plain files, a folder, and safetensors, which are private."""
    import numpy as np
    from safetensors.numpy import save_file

    (place / "config.json").write_text("{}")
    (place / "templates").mkdir()
    (place / "templates" / "one.jinja").write_text("x")
    save_file({"a": np.zeros(3)}, place / "model.safetensors")


@pytest.fixture
def umask():
    """umask(number) sets it for the test."""
    before = os.umask(0o22)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask, file, folder", [(0o22, 0o644, 0o755), (0o27, 0o640, 0o750)])
def test_modes_are_the_umask_s(tmp_path, umask, mask, file, folder):
    umask(mask)
    with files.new_directory(tmp_path / "export") as work:
        fill(work)
    assert mode(tmp_path / "export") == mode(tmp_path / "export" / "templates") == folder
    assert {mode(p) for p in (tmp_path / "export").rglob("*") if p.is_file()} == {file}
    with files.new_file(tmp_path / "one.safetensors") as partial:
        fill(partial.parent)
        shutil.copy(partial.with_name("model.safetensors"), partial)
        partial.chmod(0o600)
    assert mode(tmp_path / "one.safetensors") == file
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "one.safetensors"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError, SystemExit])
def test_nothing_is_left_after_an_exception(tmp_path, error):
    files.write_atomically(tmp_path / "file", "old")
    with files.new_directory(tmp_path / "folder") as work:
        (work / "a").write_text("old")
    with pytest.raises(error), files.new_file(tmp_path / "file") as partial:
        partial.write_text("ne")
        raise error
    with pytest.raises(error), files.new_directory(tmp_path / "folder") as work:
        (work / "b").write_text("ne")
        raise error
    assert (tmp_path / "file").read_text() == "old"
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["a"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_the_old_directory_comes_back_when_the_new_one_cannot_be_renamed(tmp_path, monkeypatch):
    with files.new_directory(tmp_path / "folder") as work:
        (work / "a").write_text("old")

    def refuse(new, target):
        raise OSError(errno.EIO, "injected")

    with pytest.raises(OSError, match="injected"):  # noqa: SIM117
        with files.new_directory(tmp_path / "folder"):
            monkeypatch.setattr(os, "replace", refuse)
    assert (tmp_path / "folder" / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def events(monkeypatch):
    """The system calls that make it durable, as (what, name) in their order."""
    seen = []

    def note(module, name, of):
        plain = getattr(module, name)

        def noted(*arguments, **options):
            seen.append((name, Path(of(arguments[0])).name))
            return plain(*arguments, **options)

        monkeypatch.setattr(module, name, noted)

    note(os, "fsync", lambda handle: os.readlink(f"/proc/self/fd/{handle}"))
    note(os, "replace", os.fspath)
    note(os, "rename", os.fspath)
    note(shutil, "rmtree", os.fspath)
    return seen


def test_contents_are_on_disk_before_the_name_and_the_old_goes_last(tmp_path, monkeypatch):
    target = tmp_path / "folder"
    for _ in range(2):
        seen = events(monkeypatch)
        with files.new_directory(target) as work:
            (work / "a").write_text("1")
            (work / "b").mkdir()
            (work / "b" / "c").write_text("2")
        monkeypatch.undo()
    names = [name for what, name in seen]
    assert [what for what, _ in seen] == [*["fsync"] * 4, "rename", "replace", "fsync", "rmtree"]
    assert {"a", "c", "b"} < set(names[:4]) and names[4:6] == ["folder", "new"]
    assert names[6] == tmp_path.name and names[7].startswith(".tmp-folder-")


def test_a_file_is_on_disk_before_its_name(tmp_path, monkeypatch):
    seen = events(monkeypatch)
    files.write_atomically(tmp_path / "file", "x")
    files.write_atomically(tmp_path / "cached", "x", durable=False)
    whats = [what for what, _ in seen]
    assert whats == ["fsync", "fsync", "replace", "fsync", "rmtree", "replace", "rmtree"]
    assert seen[0] == ("fsync", "file") and seen[3] == ("fsync", tmp_path.name)


def test_no_link_is_followed(tmp_path):
    """A link where the file goes is replaced; what it names is not touched."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "file").symlink_to(victim)
    (tmp_path / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    files.write_atomically(tmp_path / "file", "new")
    with files.new_directory(tmp_path / "folder") as work:
        assert work.parent.stat().st_mode & 0o77 == 0  # nobody else can put one there
        (work / "a").touch()
    assert victim.read_text() == "precious" and not (tmp_path / "file").is_symlink()
    assert (tmp_path / "elsewhere" / "kept").exists() and (tmp_path / "folder" / "a").exists()


def planted(kind, path, victim):
    """Put something at the path that leads to the victim."""
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "hard link":
        path.hardlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "other user":
        path.write_text("precious")
        os.chown(path, 12345, 12345)
    else:
        path.symlink_to(victim.parent / "nowhere")


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "pipe", "other user"])
def test_what_is_written_in_place_leads_nowhere(tmp_path, kind):
    """An append, a truncation and a lock, where somebody has put a way to another file."""
    if kind == "other user" and os.geteuid():
        pytest.skip("needs root")
    victim, path = tmp_path / "victim", tmp_path / "run" / "file"
    victim.write_text("precious")
    path.parent.mkdir()
    planted(kind, path, victim)
    for write in (
        lambda: files.append_line(path, "x"),
        lambda: open(path, "wb", opener=files.in_place).close(),
        lambda: files.lock_or_refuse(path, "the run", "wait"),
    ):
        with pytest.raises(OSError, match=f"{path} is "):
            write()
    assert victim.read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} == {"victim", "run"}
    assert kind != "other user" or path.read_text() == "precious"


def test_a_lock_of_a_cache_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "lock").symlink_to(victim)
    with pytest.raises(OSError), files.locked(tmp_path / "lock"):
        pass
    with files.locked(victim):
        assert victim.read_text() == "precious"


def test_a_lock_whose_file_was_replaced_is_none(tmp_path, monkeypatch):
    """Its last holder removes it between our opening and our locking it."""
    stock = files.fcntl.flock
    monkeypatch.setattr(
        files.fcntl, "flock", lambda *args: (stock(*args), (tmp_path / "lock").unlink())
    )
    assert files.try_lock(tmp_path / "lock") is None


def test_a_link_to_a_device_is_replaced(tmp_path):
    (tmp_path / "plan.json").symlink_to("/dev/null")
    files.write_atomically(tmp_path / "plan.json", "x")
    assert (tmp_path / "plan.json").read_text() == "x"


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert not files.is_locked(tmp_path / "pipe")
    with pytest.raises(ValueError):
        files.read_json(tmp_path / "pipe")


def test_a_device_stays_one(tmp_path):
    files.write_atomically(Path("/dev/null"), "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write_atomically(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through" and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    os.close(reader)


def test_a_long_name(tmp_path):
    for name in ("n" * 255, "ü" * 127):
        files.write_atomically(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"


@pytest.mark.parametrize("kind", [RuntimeError, Exception])
def test_a_full_disk_is_an_oserror_whatever_the_library_calls_it(tmp_path, kind):
    with pytest.raises(OSError, match="No space left") as error:  # noqa: SIM117
        with files.new_directory(tmp_path / "folder"):
            raise kind(FULL)
    assert error.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
    with pytest.raises(kind, match="something else"), files.new_file(tmp_path / "file"):
        raise kind("something else")


def test_a_line_is_appended_whole_or_not_at_all(tmp_path, disk):
    """The last block of a full disk takes a part of it; the next one has a line of its own."""
    place = disk(8)
    path = place / "metrics.jsonl"
    files.append_line(path, "first")
    with open(place / "filler", "wb") as filler, pytest.raises(OSError):
        while True:
            filler.write(bytes(4096))
    failed = 0
    for _ in range(100):
        try:
            files.append_line(path, "x" * 1000)
        except OSError:
            failed += 1
    (place / "filler").unlink()
    files.append_line(path, "last")
    lines = path.read_text().splitlines()
    assert failed and {*lines} == {"first", "x" * 1000, "last"}


WRITER = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from data import files
with files.new_directory(Path({target!r})) as work:
    (work / "part").write_text("x")
    print("here", flush=True)
    time.sleep(100)
"""


def test_leftovers_of_a_killed_writer(tmp_path):
    target = tmp_path / "export"
    code = WRITER.format(root=str(ROOT), target=str(target))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"here\n"
        (left,) = tmp_path.iterdir()
        files.write_atomically(target, "the first one lives")
        assert left.exists()
        process.send_signal(signal.SIGKILL)
    target.unlink()
    with files.new_directory(target) as work:
        (work / "whole").touch()
    assert [p.name for p in tmp_path.iterdir()] == ["export"] and (target / "whole").exists()


def leftover(place, host=None, pid="99999999"):
    """A directory as a dead process leaves it. No pid is that large."""
    path = place / f".tmp-target-{host or os.uname().nodename}-{pid}-abcdefgh"
    (path / "new").mkdir(parents=True)
    return path


def test_what_may_be_somebody_else_s_stays(tmp_path):
    dead, living = leftover(tmp_path), leftover(tmp_path, pid="1")
    remote, locked = leftover(tmp_path, "another-host"), leftover(tmp_path, pid="99999998")
    link = tmp_path / dead.name.replace("99999999", "99999997")
    link.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    foreign = leftover(tmp_path, pid="99999996")
    if os.getuid() == 0:
        os.chown(foreign, 12345, 12345)
    odd = tmp_path / f".tmp-target-{os.uname().nodename}-notes"
    odd.mkdir()
    handle = files.try_lock(locked, os.O_RDONLY)
    files.write_atomically(tmp_path / "target", "x")
    os.close(handle)
    assert not dead.exists() and foreign.exists() == (os.getuid() == 0)
    assert all(os.path.lexists(p) for p in (living, remote, locked, link, odd))
    files.write_atomically(tmp_path / "target", "x")
    assert not locked.exists()


def test_an_old_directory_without_a_new_one_stays(tmp_path):
    """Killed between the two renames: it is the only whole one until the next is made."""
    left = leftover(tmp_path)
    (left / "old").mkdir()
    with pytest.raises(ZeroDivisionError), files.new_directory(tmp_path / "target"):
        raise ZeroDivisionError
    assert (left / "old").exists()
    for _ in range(2):
        with files.new_directory(tmp_path / "target") as work:
            (work / "a").touch()
    assert not left.exists() and (tmp_path / "target" / "a").exists()


def test_many_writers_of_one_file(tmp_path):
    end, seen = time.monotonic() + 1, set()

    def write(text):
        while time.monotonic() < end:
            files.write_atomically(tmp_path / "file", text * 1000)

    files.write_atomically(tmp_path / "file", "a" * 1000)
    threads = [threading.Thread(target=write, args=[letter]) for letter in "ab"]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        seen.add((tmp_path / "file").read_text())
    for thread in threads:
        thread.join()
    assert seen <= {"a" * 1000, "b" * 1000}
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
