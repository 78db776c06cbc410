"""A swap disk that gives back other bytes than were written to it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NVME = ["--deepspeed", "ds_z3_nvme.json", "--lr_scheduler_type", "constant", "--save_steps", 4000]
PAGE = 4096
CHANGE = "check the disk (dmesg), then resume from the last checkpoint"


@pytest.fixture(scope="module")
def right(calm):
    """Losses of a run that nothing happens to: a run is right as far as it goes along with them."""
    return calm(*NVME, "--max_steps", 40).losses


@pytest.fixture
def steps(starts):
    """steps(*flags) → a run that goes on until it is damaged, two optimizer steps old."""

    def go(*flags, count=2):
        flags = (*NVME, "--max_steps", 4000, *flags)
        return starts("run", *flags, supervised=False).until_step(count)

    return go


def found(run, right, *words):
    """The run found it, said so, and made no optimizer step with what it read."""
    run.ends(1)
    for word in ("a swap file is damaged: ", CHANGE, *words):
        assert word in run.output, run.output[-4000:]
    assert "Traceback" not in run.output and not list(run.directory.glob("checkpoint-*"))
    both = list(zip(run.losses, right))
    assert both and all(mine == its for mine, its in both)


def victim_of(run, pattern):
    """The largest swap file of a kind."""
    (own,) = (run.directory.parent / "swap").glob("run-*")
    return max(own.rglob(pattern), key=lambda p: p.stat().st_size)


def put(path, at, content):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@pytest.mark.parametrize(
    "damage, pattern",
    [
        ("stale page", "*exp_avg.*.swp"),
        ("torn page", "*exp_avg_sq.*.swp"),
        ("two pages swapped", "*exp_avg.*.swp"),
        ("stale file", "*exp_avg_sq.*.swp"),
        ("one bit", "*_param.*.swp"),
        ("one bit", "*_weight.*.swp"),
    ],
)
def test_other_bytes(steps, right, row, damage, pattern):
    run = steps()
    victim = victim_of(run, pattern.replace(".*", "*"))
    old, at = victim.read_bytes(), 2 * PAGE
    for _ in range(30):
        # What is put there between reading and writing in an optimizer step is written over.
        made = len(run.records)
        try:
            run.until_step(made + 1)
        except AssertionError:
            break
        now = victim.read_bytes() if victim.exists() else old
        if damage == "stale page":
            bad = old[at : at + PAGE]
        elif damage == "torn page":
            bad = now[at : at + 512] + old[at + 512 : at + PAGE]
        elif damage == "two pages swapped":
            bad = now[at + PAGE : at + 2 * PAGE] + now[at : at + PAGE]
        elif damage == "stale file":
            bad, at = old, 0
        else:
            bad = bytes([now[at] ^ 1])
        try:
            put(victim, at, bad)
            run.process.wait(1)
            break
        except (subprocess.TimeoutExpired, FileNotFoundError):
            pass
    found(run, right, str(victim))
    row(
        f"the swap disk gives back other bytes: {damage}",
        "found before anybody has them: no optimizer step, exit 1",
    )


def test_an_overwrite_fails(steps, right, disk, tmp_path, row):
    """The disk takes no more writes, and says so."""
    place = disk(200, "-O", "^has_journal")
    image = tmp_path / "disk0.img"
    run = steps("--nvme_path", place)
    try:
        if subprocess.run(["chattr", "+i", str(image)]).returncode:
            pytest.skip("no chattr here")
        found(run, right, "Input/output error")
    finally:
        subprocess.run(["chattr", "-i", str(image)])
    row("an overwrite of a swap file fails", "its error ends the run, exit 1")


@pytest.fixture
def btrfs(tmp_path):
    """The directory of a small btrfs that is mounted."""
    if os.getuid() or not shutil.which("mkfs.btrfs"):
        pytest.skip("needs root and mkfs.btrfs")
    image, place = tmp_path / "btrfs.img", tmp_path / "btrfs"
    with open(image, "wb") as file:
        file.truncate(400 * 2**20)
    place.mkdir()
    subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True)
    done = subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no btrfs here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)])


def test_btrfs_is_refused(starts, btrfs, row):
    run = starts("run", *NVME, "--nvme_path", btrfs).ends(2)
    assert "cannot hold swap files" in run.output and "it is on btrfs" in run.output
    assert "--allow_any_swap_filesystem" in run.output and not list(btrfs.iterdir())
    row("swap directory on btrfs", "refused before the model is loaded, exit 2")


def test_btrfs_fills_up(steps, right, btrfs, row):
    """It was taken at the user's risk, and somebody takes the space that it could not reserve."""
    run = steps("--nvme_path", btrfs, "--allow_any_swap_filesystem", count=3)
    with open(btrfs / "filler", "wb") as file:
        try:
            while True:
                file.write(os.urandom(2**20))
        except OSError:
            pass
    found(run, right)
    row("a btrfs taken with the flag fills up", "found at the next read, exit 1")


@pytest.mark.quick
def test_a_planted_swap_path(starts, tmp_path, row):
    if os.getuid():
        pytest.skip("gives a link to another user")
    shared, victim = tmp_path / "shared", tmp_path / "victim"
    shared.mkdir()
    shared.chmod(0o1777)
    victim.mkdir()
    (shared / "swap").symlink_to(victim)
    os.chown(shared / "swap", 12345, 12345, follow_symlinks=False)
    run = starts("run", *NVME, "--nvme_path", shared / "swap").ends(2)
    assert "is a link of user 12345" in run.output and "needed:" in run.output
    assert not list(Path(victim).iterdir())
    row("the swap directory is another user's link", "refused, nothing touched, exit 2")
