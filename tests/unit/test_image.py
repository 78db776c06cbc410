"""docker/image.sh and its Make targets with engines that only say what they were asked to do."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    "bash",
    "sh",
    "basename",
    "dirname",
    "sed",
    "git",
    "date",
    "id",
    "mkdir",
    "chown",
    "realpath",
    "make",
    "awk",
    "env",
    "mv",
    "python3",
)


@pytest.fixture
def image(tmp_path, monkeypatch):
    """image(engines, *command, **environment) → the finished process.

    The machine has these container engines alone. Its paths are below tmp_path.
    """
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in TOOLS:
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    for name in (
        "RUNS",
        "NVME",
        "CACHE",
        "DATA",
        "ENV_FILE",
        "RUN_FLAGS",
        "ENGINE",
        "IMAGE",
        "TORCH_INDEX",
        "MAKEFLAGS",
    ):
        monkeypatch.delenv(name, raising=False)

    def run(engines, *command, **environment):
        for name, broken in engines.items():
            script = tools / name
            script.write_text("#!/bin/sh\n" + broken + '\nprintf "%s " "ran ${0##*/}" "$@"; echo\n')
            script.chmod(0o755)
        places = {name: str(tmp_path / name.lower()) for name in ("RUNS", "NVME", "CACHE")}
        places["XDG_CACHE_HOME"] = str(tmp_path / "home")
        command = command if command[0] == "make" else ["docker/image.sh", *command]
        return subprocess.run(
            command,
            cwd=ROOT,
            text=True,
            capture_output=True,
            env={**os.environ, **places, "ENV_FILE": "", **environment, "PATH": str(tools)},
        )

    return run


def test_the_tag(image):
    done = image({}, "tag", "cuda")
    assert (
        done.stdout.startswith("zero-offload-trainer:")
        and done.stdout.endswith("-cu130\n")
        and "-torch" in done.stdout
    )
    assert image({}, "tag", "cuda", TORCH_INDEX="https://x/whl/cu126/").stdout.endswith("-cu126\n")
    assert image({}, "tag", "cpu").stdout.endswith("-cpu\n")
    # IMAGE is for `run` alone.
    assert image({}, "tag", "cpu", IMAGE="ghcr.io/x/y:1").stdout.startswith("zero-offload-trainer:")
    assert image({}, "run", "tpu").returncode == 2


def test_the_flags(image, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "secrets").write_text("A=b\n")
    done = image(
        {"docker": ""},
        "run",
        "cuda",
        "python",
        "x.py",
        DATA=str(tmp_path / "rows"),
        ENV_FILE=str(tmp_path / "secrets"),
    )
    assert done.returncode == 0, done.stderr
    for flag in (
        f"--volume {tmp_path}/runs:/app/runs ",
        f"--volume {tmp_path}/nvme:/app/.swap ",
        f"--volume {tmp_path}/cache:/cache ",
        f"--volume {tmp_path}/rows:/data:ro ",
        "--shm-size 8g ",
        "--ulimit memlock=-1:-1 ",
        "--gpus all ",
        "--cap-drop ALL ",
        f"--env-file {tmp_path}/secrets ",
        "--stop-timeout 600 ",
        "--rm ",
        "-cu130 python x.py ",
    ):
        assert flag in done.stdout, (flag, done.stdout)
    assert "--gpus" not in image({"docker": ""}, "run", "cpu").stdout
    assert (tmp_path / "runs").stat().st_uid == (os.getuid() or 1000)
    assert "ghcr.io/x/y:1 " in image({"docker": ""}, "run", "cuda", IMAGE="ghcr.io/x/y:1").stdout


def test_in_the_background(image):
    """The container stays after its end: its log and its exit code are read afterwards."""
    done = image({"docker": ""}, "make", "docker-run", "TARGET=cpu", "DETACH=1", "CMD=python x.py")
    assert (
        done.returncode == 0
        and "--detach " in done.stdout
        and "--rm" not in done.stdout
        and "--tty" not in done.stdout
    ), done
    assert "--rm" in image({"docker": ""}, "make", "docker-run", "TARGET=cpu").stdout


@pytest.mark.parametrize(
    "engines, found",
    [
        ({"docker": "", "podman": ""}, "ran docker run"),
        # A client without its daemon.
        ({"docker": '[ "$1" != info ] || exit 1', "podman": ""}, "ran podman run"),
        # podman-docker.
        (
            {
                "docker": '[ "$1" != --version ] || { echo podman version 4.3.1; exit; }',
                "podman": "",
            },
            "ran podman run",
        ),
    ],
)
def test_the_engine(image, engines, found):
    done = image(engines, "run", "cuda")
    assert found in done.stdout, done
    assert ("--device nvidia.com/gpu=all" if "podman" in found else "--gpus all") in done.stdout


def test_the_filter_of_podman(image, tmp_path):
    """Podman's own filter and libaio's call.

    Without that call DeepSpeed waits for its requests for ever.
    """
    theirs = next(
        (
            p
            for p in map(
                Path, ("/etc/containers/seccomp.json", "/usr/share/containers/seccomp.json")
            )
            if p.is_file()
        ),
        None,
    )
    done = image({"podman": ""}, "run", "cpu")
    if theirs is None:
        assert "seccomp" not in done.stdout
        return
    assert f"--security-opt seccomp={tmp_path}/home/zero-offload-seccomp.json " in done.stdout
    rules = [
        json.loads(path.read_text())["syscalls"]
        for path in (theirs, tmp_path / "home/zero-offload-seccomp.json")
    ]
    allowed, now = (
        {name for rule in r if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}
        for r in rules
    )
    assert now == allowed | {"io_pgetevents"}
    assert not any(
        "io_pgetevents" in rule["names"] for rule in rules[1] if rule["action"] != "SCMP_ACT_ALLOW"
    )


@pytest.mark.parametrize(
    "engines, command, environment, code, words",
    [
        ({}, ["run", "cpu"], {}, 3, ["no container engine", "found:  none", "apt-get install"]),
        (
            {"docker": '[ "$1" != info ] || exit 1'},
            ["build", "cpu"],
            {},
            3,
            ["no daemon that answers", "systemctl start docker"],
        ),
        ({"docker": ""}, ["build", "cpu"], {"ENGINE": "podman"}, 3, ["no podman"]),
        (
            {"docker": '[ "$1" != buildx ] || exit 1'},
            ["build", "cpu"],
            {},
            3,
            ["no buildx", "docker-buildx"],
        ),
        (
            {"docker": '[ "$1" != image ] || exit 1'},
            ["run", "cpu"],
            {},
            3,
            ["the image is not there", "make docker-build TARGET=cpu"],
        ),
        (
            {"docker": ""},
            ["run", "cpu"],
            {"DATA": "s3://bucket/rows"},
            2,
            ["s3://bucket/rows", "--dataset"],
        ),
        (
            {"docker": ""},
            ["run", "cpu"],
            {"DATA": "/no/such"},
            2,
            ["DATA is not a directory", "/no/such"],
        ),
        (
            {"docker": ""},
            ["run", "cpu"],
            {"ENV_FILE": "/no/such"},
            2,
            ["ENV_FILE is not a file", "/no/such"],
        ),
    ],
)
def test_what_is_refused(image, engines, command, environment, code, words):
    done = image(engines, *command, **environment)
    assert done.returncode == code and "ran docker" not in done.stdout, done
    for word in words:
        assert word in done.stderr, done.stderr


def test_mounts_for_compose(image, tmp_path):
    done = image({}, "mounts")
    assert done.returncode == 0 and all(
        (tmp_path / name).is_dir() for name in ("runs", "nvme", "cache")
    ), done
    assert done.stdout == (
        "" if os.getuid() == 0 else f"export USER_ID={os.getuid()} GROUP_ID={os.getgid()}\n"
    )
