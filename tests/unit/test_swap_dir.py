"""The swap directory: its file system, who may own what, and the stamps of its files."""

import ctypes
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from data import storage
from trainer.errors import FAILED, RunError
from trainer.system import swap_dir
from trainer.system.swap_dir import MARKER, SwapSpace
from trainer.system.swap_stamps import BLOCK, Stamps

OTHER = 12345  # another user
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


# -- file systems ------------------------------------------------------------------------------
MOUNTINFO = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
31 27 0:40 / /mnt/with\040blank rw,relatime shared:1 master:2 - tmpfs tmpfs rw
32 27 0:41 /sub /mnt/a\040-\040b rw - btrfs /dev/vdb rw
3 27 0:42 / /mnt/short rw - fuse.sshfs me@there:/ rw
331 31 0:43 / /mnt/with\040blank rw - nfs4 server:/ rw
"""


@pytest.mark.parametrize(
    "number, kind",
    [
        ("27", "ext4"),
        ("31", "tmpfs"),
        ("331", "nfs4"),
        ("32", "btrfs"),
        ("3", "fuse.sshfs"),
        ("9", ""),
    ],
)
def test_the_type_of_a_mount(number, kind):
    assert storage.mount_type(MOUNTINFO, number) == kind


@pytest.fixture
def mounts():
    """mounts(*arguments of mount): undone at the end."""
    points = []

    def mount(*arguments):
        done = subprocess.run(["mount", *map(str, arguments)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no mount here: {done.stderr.decode().strip()}")
        points.append(arguments[-1])

    yield mount
    for point in reversed(points):
        subprocess.run(["umount", "-l", str(point)], check=True)


@as_root
def test_real_mounts(mounts, tmp_path):
    """Blanks, a mount over a mount, one that hides another, a bind mount and a link."""
    here, blank = storage.filesystem_of(tmp_path), tmp_path / "with blank"
    blank.mkdir()
    mounts("-t", "tmpfs", "none", blank)
    assert storage.filesystem_of(blank / "not" / "there") == "tmpfs"
    (tmp_path / "link").symlink_to(blank)
    assert storage.filesystem_of(tmp_path / "link" / "x") == "tmpfs"
    mounts("-t", "ramfs", "none", blank)
    assert storage.filesystem_of(blank) == "ramfs"
    (tmp_path / "disk").mkdir()
    mounts("--bind", tmp_path / "disk", blank)
    assert storage.filesystem_of(blank) == here
    outer = tmp_path / "outer"
    (outer / "inner").mkdir(parents=True)
    mounts("-t", "tmpfs", "none", outer / "inner")
    mounts("-t", "ramfs", "none", outer)
    (outer / "inner").mkdir()
    assert storage.filesystem_of(outer / "inner") == "ramfs"
    (tmp_path / "moved").mkdir()
    mounts("--bind", blank, tmp_path / "moved")
    assert storage.filesystem_of(tmp_path / "moved") == here


@pytest.mark.parametrize(
    "kind, flag, words",
    [
        ("ext4", False, None),
        ("xfs", False, None),
        ("btrfs", False, "it is on btrfs, .*--allow_any_swap_filesystem"),
        ("zfs", False, "it is on zfs, "),
        ("bcachefs", False, "it is on bcachefs, "),
        ("ext3", False, "it is on ext3, "),
        ("", False, "an unknown filesystem"),
        ("overlay", False, "it is on overlay, .*docker run -v /mnt/nvme:.*--mount type=bind"),
        ("btrfs", True, None),
        ("overlay", True, None),
        *((kind, True, f"it is on {kind}\n") for kind in ("tmpfs", "ramfs", "nfs4", "cifs")),
        *((kind, True, f"it is on {kind}\n") for kind in ("fuse.sshfs", "glusterfs", "lustre")),
        *((kind, True, f"it is on {kind}\n") for kind in ("virtiofs", "9p", "ceph", "smb3")),
    ],
)
def test_which_file_systems(tmp_path, monkeypatch, kind, flag, words):
    monkeypatch.setattr(storage, "filesystem_of", lambda path: kind)
    if words is None:
        swap_dir.check_place(tmp_path, flag)
        return
    with pytest.raises(RunError, match=f"(?s)cannot hold swap files.*{words}") as error:
        swap_dir.check_place(tmp_path, flag)
    assert error.value.code == 2 and "ext4 or xfs" in str(error.value)


# -- places that other users can write to ------------------------------------------------------
@pytest.fixture
def shared(tmp_path):
    """A directory in which everybody may make files, as /tmp."""
    place = tmp_path / "shared"
    place.mkdir()
    place.chmod(0o1777)
    return place


def give_away(path):
    os.chown(path, OTHER, OTHER, follow_symlinks=False)
    return path


def snapshot(folder):
    return {p: (p.lstat().st_ino, p.is_file() and p.read_bytes()) for p in folder.rglob("*")}


@as_root
@pytest.mark.parametrize("planted", ["link", "directory", "link above"])
def test_a_planted_swap_path_is_refused(shared, tmp_path, planted):
    victim = tmp_path / "victim"
    victim.mkdir()
    path = shared / "swap"
    if planted == "directory":
        path.mkdir(mode=0o777)
    else:
        path.symlink_to(victim)
    give_away(path)
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match=f"of user {OTHER}") as error:
        swap_dir.check_directory(path / "below" if planted == "link above" else path)
    assert error.value.code == 2 and "needed:" in str(error.value) and "fix:" in str(error.value)
    assert snapshot(tmp_path) == before


@as_root
@pytest.mark.parametrize("planted", ["behind a link of ours", "link in a group's directory"])
def test_a_planted_place_behind_others(shared, tmp_path, planted):
    path, target = shared / "swap", shared / "target"
    if planted == "behind a link of ours":
        give_away(target.mkdir(mode=0o777) or target)
        path = tmp_path / "swap"
        path.symlink_to(target)
    else:
        shared.chmod(0o2770)
        path.symlink_to(tmp_path)
        give_away(path)
    with pytest.raises(RunError, match=f"of user {OTHER}"):
        swap_dir.check_directory(path)


@pytest.mark.parametrize("kind", ["dangling", "circle", "long"])
def test_a_path_that_leads_nowhere(tmp_path, kind):
    path = tmp_path / ("x" * 300 if kind == "long" else "swap")
    if kind != "long":
        path.symlink_to(path if kind == "circle" else tmp_path / "nothing")
    for place in (path, path / "below"):
        with pytest.raises(RunError, match="nothing is there|name too long") as error:
            swap_dir.check_directory(place)
        assert error.value.code == 2


@as_root
def test_an_address_is_no_swap_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="an address"):
        swap_dir.check_directory("s3://bucket/swap")
    assert not list(tmp_path.iterdir())


def test_a_mount_that_does_not_answer(tmp_path, monkeypatch):
    """A file system of FUSE whose server never reads: each stat of it waits for ever."""
    try:
        server = os.open("/dev/fuse", os.O_RDWR)
    except OSError:
        pytest.skip("no /dev/fuse")
    options = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
    libc = ctypes.CDLL(None)
    if libc.mount(b"silent", bytes(tmp_path), b"fuse", 0, options):
        pytest.skip("no mount here")
    try:
        monkeypatch.setattr(swap_dir, "PROBE_SECONDS", 0.5)
        with pytest.raises(RunError, match="no answer in 0.5 s"):
            swap_dir.check_directory(tmp_path / "swap")
    finally:
        libc.umount2(bytes(tmp_path), 2)  # MNT_DETACH
        os.close(server)  # ends what waits


def test_links_of_ones_own_are_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "swap").symlink_to(tmp_path / "disk")
    swap_dir.check_directory(tmp_path / "swap")
    assert not list((tmp_path / "disk").iterdir())


@as_root
@pytest.mark.parametrize("planted", ["link", "dangling", "directory", "file", "writable"])
def test_a_planted_run_directory_is_not_adopted(shared, tmp_path, planted):
    folder, victim = shared / "run-1", tmp_path / "victim"
    victim.mkdir()
    if planted in ("directory", "writable"):
        folder.mkdir()
        folder.chmod(0o777)
    elif planted == "file":
        folder.touch()
    else:
        folder.symlink_to(victim if planted == "link" else tmp_path / "nothing")
    if planted != "writable":
        give_away(folder)
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match="cannot be made"):
        SwapSpace(folder).own()
    assert snapshot(tmp_path) == before


def test_planted_files_are_not_written_to(tmp_path):
    space, victim = SwapSpace(tmp_path / "run"), tmp_path / "victim"
    space.own()
    victim.write_text("precious")
    (space.folder / "reserve-0").symlink_to(victim)
    (space.folder / "a.swp").symlink_to(victim)
    with pytest.raises(RunError, match="no swap space"):
        space.reserve_space(0, 4096, 1)
    space.reserve = None
    with pytest.raises(RunError, match="File exists"):
        space.prepare(str(space.folder / "a.swp"), 4096)
    assert victim.read_text() == "precious"
    space.close()
    assert victim.exists() and not space.folder.exists()


def test_a_directory_with_files_is_not_adopted(tmp_path):
    space = SwapSpace(tmp_path / "run-7")
    space.folder.mkdir(mode=0o700)
    (space.folder / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="is not empty(?s:.*)thesis.tex"):
        space.own()
    space.close()
    assert (space.folder / "thesis.tex").read_text() == "precious"


def test_another_directory_in_its_place_is_not_removed(tmp_path):
    """Who may write to the place can rename ours and put another there."""
    space = SwapSpace(tmp_path / "run")
    space.own()
    space.folder.rename(tmp_path / "away")
    space.folder.mkdir()
    (space.folder / MARKER).write_text("{}")
    space.close()
    assert (space.folder / MARKER).exists()


def test_own_directory(tmp_path):
    space = SwapSpace(tmp_path / "run", "20261129-abc")
    space.own()
    assert space.folder.stat().st_mode & 0o777 == 0o700
    holder = json.loads((space.folder / MARKER).read_text())
    assert holder["pid"] == os.getpid() and holder["run_id"] == "20261129-abc"
    assert {"host", "started"} <= set(holder)
    with pytest.raises(RunError, match=f"in use(?s:.)*pid {os.getpid()}"):
        SwapSpace(tmp_path / "run").own()
    space.close()


@as_root
@pytest.mark.parametrize(
    "planted", ["other's", "link", "empty marker", "marker is a link", "other's marker", "writable"]
)
def test_what_is_not_reclaimed(shared, tmp_path, planted, capsys):
    folder, text = shared / "dead", json.dumps({"pid": 1, "host": "h", "started": "s"})
    target = tmp_path / "target" if planted == "link" else folder
    target.mkdir(mode=0o700)
    (target / "a.swp").write_bytes(b"x")
    marker = target / MARKER
    marker.write_text("" if planted == "empty marker" else text)
    if planted == "link":
        folder.symlink_to(target)
    elif planted == "other's":
        give_away(folder)
    elif planted == "marker is a link":
        marker.rename(tmp_path / "elsewhere")
        marker.symlink_to(tmp_path / "elsewhere")
    elif planted == "other's marker":
        give_away(marker)
    elif planted == "writable":
        folder.chmod(0o777)
    before = snapshot(tmp_path)
    swap_dir.reclaim(shared)
    assert snapshot(tmp_path) == before and not capsys.readouterr().out


def test_a_dead_run_is_reclaimed_and_links_in_it_are_not_followed(tmp_path, capsys):
    space = SwapSpace(tmp_path / "swap" / "dead", "id")
    space.own()
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    (space.folder / "link").symlink_to(victim)
    (space.folder / "a.swp").write_bytes(b"x" * 10**6)
    swap_dir.reclaim(tmp_path / "swap")
    assert space.folder.exists()  # its run lives
    os.close(space.lock)
    swap_dir.reclaim(tmp_path / "swap")
    assert not space.folder.exists() and "reclaimed (dead)" in capsys.readouterr().out
    assert (victim / "file").read_text() == "precious"


# -- stamps ------------------------------------------------------------------------------------
SIZE = 3 * BLOCK + 4096


def done(futures):
    for future in futures:
        future.result()


@pytest.fixture
def file(tmp_path):
    """(stamps, path, content) of a file that was written twice and is right."""
    stamps, path = Stamps(), tmp_path / "a.swp"
    old, new = (bytearray(os.urandom(SIZE)) for _ in range(2))
    for content in (old, new):
        done(stamps.written(str(path), memoryview(content)))
    path.write_bytes(new)
    return stamps, path, old, new


def check(stamps, path, content, offset=0):
    done(stamps.read(str(path), memoryview(content), offset))


def test_what_was_written_is_read(file):
    stamps, path, _, new = file
    check(stamps, path, new)
    for begin, end in ((0, 512), (BLOCK, 2 * BLOCK), (BLOCK - 512, BLOCK + 512), (512, SIZE - 512)):
        check(stamps, path, new[begin:end], begin)


@pytest.mark.parametrize("damage", ["bit", "stale page", "swapped pages", "stale file", "sector"])
def test_damage_is_found(file, damage):
    stamps, path, old, new = file
    at, bad = BLOCK + 8192, bytearray(new)
    if damage == "bit":
        bad[at] ^= 1
    elif damage == "stale page":
        bad[at : at + 4096] = old[at : at + 4096]
    elif damage == "sector":
        bad[at : at + 512] = old[at : at + 512]
    elif damage == "swapped pages":
        bad[at : at + 4096], bad[at + 4096 : at + 8192] = (
            new[at + 4096 : at + 8192],
            new[at : at + 4096],
        )
    else:
        bad, at = old, 0
    found = "there before the last write" if damage == "stale file" else "other bytes"
    begin = at // BLOCK * BLOCK
    words = f"damaged: {path}\n.*{found}, from byte {begin:,} to {begin + BLOCK:,}"
    with pytest.raises(RunError, match=words) as error:
        check(stamps, path, bad)
    assert error.value.code == FAILED and "dmesg" in str(error.value)


def test_a_part_of_a_damaged_block_is_not_read(file):
    """Also where the damage is outside of the part: one checksum covers both."""
    stamps, path, _, new = file
    with open(path, "r+b") as disk:
        disk.seek(8192)
        disk.write(b"other")
    with pytest.raises(RunError, match="other bytes"):
        check(stamps, path, new[:4096])


def test_overwritten_in_part(file):
    stamps, path, _, new = file
    part = bytearray(os.urandom(4096))
    done(stamps.written(str(path), memoryview(part), BLOCK))
    new[BLOCK : BLOCK + 4096] = part
    check(stamps, path, part, BLOCK)
    with pytest.raises(RunError, match=f"byte {BLOCK + 4096:,} was never written"):
        check(stamps, path, new)
    with pytest.raises(RunError, match="byte 0 was never written"):
        check(stamps, Path("unknown"), part)


def test_the_check_costs_little():
    """A fiftieth of the time of a disk that reads and writes 1 GB/s, even on two slow cores."""
    stamps, content = Stamps(), memoryview(bytearray(2**28))
    done(stamps.written("a", content))
    began = time.process_time()
    done(stamps.read("a", content))
    assert time.process_time() - began < 0.25 * 2**28 / 1e9


# -- DeepSpeed's handle ------------------------------------------------------------------------
class Handle:
    """As DeepSpeed's: it never looks whether the disk took a write. fault: what the disk does."""

    fault = None

    def __init__(self):
        self.queue = []

    def async_pwrite(self, buffer, path, offset=0):
        self.queue.append((buffer, path, offset, True))
        return 0

    def async_pread(self, buffer, path, offset=0):
        self.queue.append((buffer, path, offset, False))
        return 0 if self.fault != "no such file" else -1

    def wait(self):
        import torch

        for buffer, path, offset, writes in self.queue:
            content = memoryview(buffer.view(-1).view(torch.uint8).numpy())
            with open(path, "r+b") as file:
                file.seek(offset)
                if not writes:
                    file.readinto(content)
                elif self.fault == "short":
                    file.write(content[: len(content) // 2])
                elif self.fault != "lost":
                    file.write(content)
        done, self.queue = len(self.queue), []
        return done - (self.fault == "incomplete")


@pytest.fixture
def swapped(tmp_path, monkeypatch):
    """(space, the handle's class, path of a swap file) of a run whose files are watched."""
    from trainer.engine import aio

    class Op:
        aio_handle = type("aio_handle", (Handle,), {})

    monkeypatch.setattr(aio, "load_aio", lambda: Op)
    monkeypatch.setattr(aio, "watched", None)
    space = SwapSpace(tmp_path / "run")
    space.own()
    aio.watch_swap_files(space, libaio=True)
    yield space, Op.aio_handle, str(space.folder / "a.swp")
    space.close()


def test_reads_and_writes_of_a_handle(swapped):
    import torch

    _, kind, path = swapped
    writer, reader = kind(), kind()
    sent = torch.randn(3 * BLOCK // 4 + 512)
    writer.async_pwrite(sent, path, 0)
    writer.async_pwrite(sent.bfloat16()[:1024], path[:-4] + "b.swp")
    assert writer.wait() == 2
    got, half = torch.empty_like(sent), torch.empty(1024, dtype=torch.bfloat16)
    reader.async_pread(got, path, 0)
    reader.async_pread(half, path[:-4] + "b.swp", 0)
    assert reader.wait() == 2 and got.equal(sent) and half.equal(sent.bfloat16()[:1024])
    part = torch.empty(4096)
    reader.async_pread(part, path, BLOCK)
    assert reader.wait() == 1 and part.equal(sent[BLOCK // 4 :][:4096])
    for other in (reader.pread, reader.sync_pwrite):
        with pytest.raises(NotImplementedError, match="not checked"):
            other(part, path)


@pytest.mark.parametrize("fault", ["lost", "short", "no such file", "incomplete"])
def test_faults_of_a_handle(swapped, fault):
    import torch

    _, kind, path = swapped
    handle = kind()
    old, new = torch.randn(2, BLOCK // 2)  # two blocks each
    handle.async_pwrite(old, path)
    handle.wait()
    kind.fault = fault if fault in ("lost", "short") else None
    handle.async_pwrite(new, path)
    handle.wait()
    kind.fault = fault
    words = {
        "lost": "before the last write, from byte 0 to",
        "short": f"before the last write, from byte {BLOCK:,} to",
        "no such file": "its transfer was not begun",
        "incomplete": "0 transfers completed",
    }
    with pytest.raises(RunError, match=words[fault]) as error:
        handle.async_pread(old, path)
        handle.wait()
    assert error.value.code == FAILED


def test_a_checkpoint_reads_what_was_written(swapped):
    import torch

    from trainer.engine.optimizer_state import CHUNK_BYTES, _read_file

    space, kind, path = swapped
    handle, sent = kind(), torch.randn(CHUNK_BYTES // 2)
    handle.async_pwrite(sent, path)
    handle.wait()
    content = memoryview(sent.numpy()).cast("B")
    for begin, size in (
        (0, len(content)),
        (12, 4),
        (BLOCK + 4, CHUNK_BYTES),
        (4, CHUNK_BYTES * 3 // 2),
    ):
        blocks = list(_read_file(path, begin, size, space))
        assert b"".join(blocks) == content[begin : begin + size]
    with open(path, "r+b") as file:
        file.seek(BLOCK)
        file.write(bytes(512))
    assert list(_read_file(path, 0, BLOCK, space))
    with pytest.raises(RunError, match=f"other bytes, from byte {BLOCK:,}"):
        list(_read_file(path, BLOCK + 4096, 4096, space))
