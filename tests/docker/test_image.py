"""The CPU's image, built for real and used as its users do.

As another user, without a network, with mounts that are wrong. buildah with chroot isolation needs
neither a daemon nor a registry. The base is made by debootstrap. A machine's own packages and
certificates, PIP_FIND_LINKS and PIP_CERT, are passed on. Needs root, and about 20 GB of disk.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(
    os.getuid() != 0 or not shutil.which("buildah") or not shutil.which("debootstrap"),
    reason="needs root, buildah and debootstrap",
)
BASE = "localhost/debian-for-tests:bookworm"
STEPS = (
    "--max_steps 3 --eval_strategy no --eval_on_start false --export false --save_strategy no"
).split()
TRAIN = ["deepspeed", "launch/train.py", "--config", "tiny_cpu", *STEPS, "--deepspeed"]


def sh(*command, **options):
    return subprocess.run(
        [str(c) for c in command], text=True, capture_output=True, check=True, **options
    ).stdout.strip()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A Debian of this machine's mirror, as an image."""
    if subprocess.run(
        ["buildah", "inspect", "--type", "image", BASE], capture_output=True
    ).returncode:
        root = tmp_path_factory.mktemp("debian")
        sh("debootstrap", "--variant=minbase", "bookworm", root / "root")
        sh("tar", "-C", root / "root", "-cf", root / "root.tar", ".")
        made = sh("buildah", "from", "scratch")
        sh("buildah", "add", "--quiet", made, root / "root.tar", "/")
        sh("buildah", "commit", "--quiet", made, BASE)
        sh("buildah", "rm", made)
    return BASE


def build(checkout, base):
    """Return (the image's name, seconds, the output)."""
    flags = ["--isolation", "chroot", "--network", "host", "--pull-never"]
    environment = {**os.environ, "ENGINE": "buildah", "BASE": base, "DEBIAN_SNAPSHOT": ""}
    links, certificates = os.environ.get("PIP_FIND_LINKS", ""), os.environ.get("PIP_CERT", "")
    if Path(links or "/nowhere").is_dir():  # a torch for the CPU lies there
        flags += ["--volume", f"{links}:{links}:ro"]
        environment["TORCH_INDEX"] = "https://pypi.org/simple"
    if certificates:
        flags += ["--volume", f"{certificates}:/build-ca.crt:ro"]
        environment["PIP_CERT"] = "/build-ca.crt"
    began = time.monotonic()
    done = subprocess.run(
        ["docker/image.sh", "build", "cpu"],
        cwd=checkout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**environment, "BUILD_FLAGS": " ".join(flags)},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout.splitlines()[-1], time.monotonic() - began, done.stdout


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of this checkout, without what git ignores. A build and a change leave no traces."""
    folder = tmp_path_factory.mktemp("checkout") / "repository"
    files = sh(
        "git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT
    ).splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def image(checkout, base):
    return build(checkout, base)[0]


@pytest.fixture
def folders(tmp_path):
    """The mounts' places on the host, the image's own user's."""
    made = {name: tmp_path / name for name in ("runs", "nvme", "cache")}
    for folder in made.values():
        folder.mkdir()
        os.chown(folder, 1000, 1000)
    # pytest's own are closed to other users.
    for parent in [tmp_path, *list(tmp_path.parents)[:-2]]:
        parent.chmod(parent.stat().st_mode | 0o011)
    return made


def mounts(folders):
    """The environment of docker/image.sh."""
    places = {name.upper(): str(folder) for name, folder in folders.items()}
    return {**os.environ, **places, "ENGINE": "buildah", "ENV_FILE": ""}


def start(checkout, folders, *command, before="true", flags=""):
    """Start a command in a working container whose network has only the loopback.

    before: shell commands, in the same namespaces.
    """
    environment = {**mounts(folders), "RUN_FLAGS": flags}
    script = f'ip link set lo up; {before}; exec docker/image.sh run cpu "$@"'
    return subprocess.Popen(
        ["unshare", "--net", "--mount", "bash", "-c", script, "run", *map(str, command)],
        cwd=checkout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    )


def run(*arguments, timeout=900, **options):
    with start(*arguments, **options) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            raise
    return subprocess.CompletedProcess(arguments, process.returncode, output)


def test_what_the_image_is(image, capsys):
    known = json.loads(sh("buildah", "inspect", "--type", "image", image))
    config = known["Docker"]["config"]
    assert config["User"] == "1000:1000" and config["StopSignal"] == "SIGTERM"
    assert config["Entrypoint"] == ["/usr/bin/tini", "-s", "-g", "--"]
    assert config["Cmd"] == ["python", "launch/doctor.py"] and "health.py" in " ".join(
        config["Healthcheck"]["Test"]
    )
    assert {"title", "version", "revision", "created", "licenses", "base.name"} <= {
        label.removeprefix("org.opencontainers.image.") for label in config["Labels"]
    }
    torch = re.search(r"^torch==([0-9.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert image.endswith(f"-torch{torch}-cpu")
    assert not [e for e in config["Env"] if re.search("TOKEN|KEY|PIP_|ca.crt", e)]
    made = sh("buildah", "from", "--pull-never", image)
    mounted = Path(sh("buildah", "mount", made))
    try:
        size = sum(p.lstat().st_blocks * 512 for p in mounted.rglob("*"))
        assert not [
            p
            for n in ("gcc", "g++", "sshd", "cc")
            for p in (mounted / "usr/bin", mounted / "usr/sbin")
            if (p / n).exists()
        ]
        assert not (mounted / "app/runs").exists() or not any((mounted / "app/runs").iterdir())
    finally:
        sh("buildah", "rm", made)
    with capsys.disabled():
        print(f"\n{image}: {size / 1e9:.2f} GB")
    assert size < 2.5e9


def test_doctor_passes(image, checkout, folders):
    done = run(checkout, folders)
    assert done.returncode == 0, done.stdout
    for line in (
        "gpu +none: this is the CPU's image",
        "compiler +not needed: the ops are built",
        "op builds +cpu_adam are built",
    ):
        assert re.search(f"ok +{line}", done.stdout), done.stdout
    assert "0 failure(s)" in done.stdout


@pytest.mark.parametrize(
    "before, flags, broken, words",
    [
        (
            "export FROM_FLAGS='--ulimit memlock=65536:65536'",
            "",
            None,
            ["locked memory", "--ulimit memlock=-1"],
        ),
        (
            "mount -t tmpfs -o size=64m tmpfs /dev/shm",
            "",
            None,
            ["shared memory", "0.06 GiB", "--shm-size"],
        ),
        ("true", "", "runs", ["run disk", "owned by 0:0", "--user 0:0", "chown 1000:1000"]),
        ("true", "", "cache", ["cache", "owned by 0:0", "--user"]),
        ("true", "", "nvme", ["nvme", "owned by 0:0", "--user"]),
        ("mount -t tmpfs -o ro tmpfs $RUNS", "", None, ["run disk", "read-only", "without :ro"]),
        (
            "true",
            "--env ZERO_OFFLOAD_IMAGE=cuda",
            None,
            ["gpu", "none was passed through", "--gpus all"],
        ),
    ],
)
def test_doctor_says_what_is_wrong(image, checkout, folders, before, flags, broken, words):
    if broken:
        os.chown(folders[broken], 0, 0)
        folders[broken].chmod(0o755)
    done = run(checkout, folders, before=before, flags=flags)
    assert done.returncode == 3 and "0 failure(s)" not in done.stdout, done.stdout
    for word in words:
        assert word in done.stdout, done.stdout


def test_trains_without_a_network(image, checkout, folders):
    """The default model, as user 1000. Nothing is compiled, and nothing is fetched."""
    for config in ("ds_z3_offload", "ds_z3_nvme"):
        done = run(checkout, folders, *TRAIN, f"{config}.json", "--run_name", config)
        assert done.returncode == 0, done.stdout[-4000:]
        assert "building DeepSpeed" not in done.stdout and "fetching" not in done.stdout
        lines = [
            json.loads(line)
            for line in (folders["runs"] / config / "metrics.jsonl").read_text().splitlines()
        ]
        assert len([line for line in lines if "loss" in line]) == 3
        assert (folders["runs"] / config).stat().st_uid == 1000
    done = run(checkout, folders, "python", "docker/health.py")
    assert done.returncode == 0 and "no run" in done.stdout


def test_a_stop_saves(image, checkout, folders):
    """As `docker stop` does: SIGTERM to the first process.

    The run ends after its optimizer step, with a checkpoint from which it goes on.
    """
    flags = (
        "--config tiny_cpu --deepspeed ds_z3_offload.json --eval_strategy no "
        "--eval_on_start false --export false --run_name stopped"
    ).split()
    with start(
        checkout, folders, "python", "launch/supervise.py", *flags, "--max_steps", "500"
    ) as process:
        output = ""
        for line in process.stdout:
            output += line
            if line.startswith("step 2/"):
                (first,) = (
                    p
                    for p in psutil.Process(process.pid).children(recursive=True)
                    if p.name() == "tini"
                )
                first.terminate()
    assert process.returncode == 75, output
    (saved,) = (folders["runs"] / "stopped").glob("checkpoint-*")
    at = int(saved.name.split("-")[1])
    assert (
        2 <= at < 10
        and saved.stat().st_uid == 1000
        and "to go on: python launch/supervise.py" in output
    ), output
    done = run(
        checkout,
        folders,
        "python",
        "launch/supervise.py",
        *flags,
        "--max_steps",
        at + 1,
        "--resume_from_checkpoint",
        "auto",
    )
    assert done.returncode == 0 and f"step {at + 1}/{at + 1}" in done.stdout, done.stdout[-4000:]


# A run that lives was last seen 10 seconds ago, then 4,000 seconds ago.
HEALTH = """
import fcntl, json, os, subprocess, sys, time
os.makedirs("runs/x")
lock = open("runs/x/.running", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
codes = []
for ago in (10, 4000):
    heartbeat = {"step": 1, "phase": "train", "time": time.time() - ago}
    with open("runs/x/heartbeat.json", "w") as file:
        json.dump(heartbeat, file)
    codes.append(subprocess.call([sys.executable, "docker/health.py"]))
print(codes)
"""


def test_health(image, checkout, folders):
    """Healthy while a run lives and shows it.

    Not where a living run is silent for longer than the supervisor would wait.
    """
    done = run(checkout, folders, "python", "-c", HEALTH)
    assert "[0, 1]" in done.stdout and "x: train, last seen 4,000 s ago" in done.stdout, done.stdout


def test_the_notebook(image, checkout, folders):
    done = run(
        checkout,
        folders,
        "bash",
        "-c",
        "cp launch/notebooks/quickstart.ipynb runs/ && cd runs && jupyter execute quickstart.ipynb",
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_a_change_of_the_code_builds_fast(image, checkout, base, capsys):
    # ops.py: our own step is compiled again, and the model's package is not fetched.
    for name in ("__init__.py", "trainer.py", "system/ops.py"):
        with open(checkout / "trainer" / name, "a") as file:
            file.write(f"# {time.time()}\n")
    _, seconds, output = build(checkout, base)
    with capsys.disabled():
        print(f"\nbuilt again after a change in trainer/: {seconds:.0f} s")
    assert seconds < 30 and "Collecting" not in output


def test_starts_as_fast_as_outside(image, checkout, folders, capsys):
    """Compare the seconds from the command to the first optimizer step, three times in turn.

    The container's include the start of the working container.
    """

    def seconds(command, **options):
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=checkout,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **options,
        )
        for line in process.stdout:
            if line.startswith("step 1/"):
                first_step = time.monotonic() - began
        assert process.wait() == 0
        return first_step

    outside = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    times = {"inside": [], "outside": []}
    for i in range(4):
        command = [*TRAIN, "ds_z3_offload.json", "--run_name"]
        times["outside"].append(seconds([*command, f"out{i}"], env=outside))
        times["inside"].append(
            seconds(["docker/image.sh", "run", "cpu", *command, f"in{i}"], env=mounts(folders))
        )
    # The median of three. The first run of each fills caches.
    inside, out = (sorted(times[k][1:])[1] for k in ("inside", "outside"))
    with capsys.disabled():
        print(
            f"\nto the first optimizer step: {inside:.1f} s in the container, {out:.1f} s outside"
        )
    assert inside <= 1.1 * out
