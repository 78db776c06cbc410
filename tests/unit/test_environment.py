"""Any locale, any user id, a HOME that cannot be written to, any working directory."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT

PLAN = "--model llama-3.1-8b --gpus 1 --gpu_memory 80GB --ram 500GB --nvme 0".split()
NOBODY = 54321
PLACES = """
import getpass, json, os, sys
sys.path.insert(0, sys.argv[1])
from trainer.system import user
user.prepare()
import huggingface_hub.constants as hub
import matplotlib
from data.files import user_cache
print(json.dumps({
    "user": getpass.getuser(), "hub": hub.HF_HUB_CACHE, "own": str(user_cache()),
    "plots": matplotlib.get_configdir(), "triton": os.environ.get("TRITON_HOME"),
    "home": os.path.expanduser("~"), "config": os.environ.get("XDG_CONFIG_HOME"),
}))
"""
HOMELESS = ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TMPDIR")


@pytest.fixture(scope="module")
def locales(tmp_path_factory):
    """A folder with locales of other encodings, for LOCPATH."""
    folder = tmp_path_factory.mktemp("locales")
    for name, source, charmap in (
        ("zh_CN.GBK", "zh_CN", "GBK"),
        ("de_DE.ISO-8859-1", "de_DE", "ISO-8859-1"),
    ):
        made = shutil.which("localedef") and subprocess.run(
            ["localedef", "-c", "-i", source, "-f", charmap, folder / name], capture_output=True
        )
        if not made or not (folder / name / "LC_CTYPE").exists():
            pytest.skip("localedef has no sources of locales here")
    return folder


def launch(name, *flags, cwd=ROOT, env=None, **options):
    """Run a command of launch/ by its absolute path. Return the finished process, with bytes."""
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / f"{name}.py"), *flags],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        timeout=60,
        **options,
    )


@pytest.mark.parametrize(
    "name, encoding, word",
    [
        ("zh_CN.GBK", "gbk", "数据"),
        ("de_DE.ISO-8859-1", "latin-1", "größe"),
        ("C", "utf-8", "数据"),
    ],
)
def test_locale(locales, tmp_path, name, encoding, word):
    """Files are UTF-8 in any of them; what is printed is in the locale's encoding."""
    text = f"run_name: {word}\nlearning_rat: 1"
    (tmp_path / f"{word}.yaml").write_text(text, encoding="utf-8")
    env = {"LC_ALL": name, "LOCPATH": str(locales), "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = launch("train", "--config", f"{word}.yaml", cwd=tmp_path, env=env)
    assert done.returncode == 2, done.stderr
    assert f"{word}.yaml: unknown key learning_rat" in done.stderr.decode(encoding), done.stderr
    assert launch("plan", *PLAN, env=env).returncode == 0


def test_python_that_ignores_its_environment(locales):
    """It is started again once, not for ever."""
    env = {"LC_ALL": "zh_CN.GBK", "LOCPATH": str(locales)}
    command = [sys.executable, "-X", "utf8=0", str(ROOT / "launch" / "train.py"), "--help"]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, timeout=60)
    assert done.returncode == 0


@pytest.fixture
def nobody():
    """A function that runs Python as a user without an entry, whose HOME is /."""
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("only root can be another user")
    env = {name: value for name, value in os.environ.items() if name not in HOMELESS}
    place = Path(tempfile.mkdtemp())  # pytest's own is closed to others
    place.chmod(0o1777)
    # It may read all, also a Python in root's home; it may write nowhere but in its own.
    prefix = f"setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups --no-new-privs "
    prefix += "--inh-caps +dac_read_search --ambient-caps +dac_read_search --"

    def run(*command, **changes):
        variables = {**env, "HOME": "/", "TMPDIR": str(place), **changes}
        return subprocess.run(
            [*prefix.split(), sys.executable, *map(str, command)],
            env={name: value for name, value in variables.items() if value is not None},
            cwd=place,
            capture_output=True,
            text=True,
            timeout=60,
        )

    run.place = place
    if run("-c", "").returncode:
        pytest.skip("setpriv cannot give this user the right to read")
    yield run
    shutil.rmtree(place)


@pytest.mark.parametrize("home", ["/", "", None, "/nowhere/at/all", "relative"])
def test_a_user_without_home(nobody, home):
    done = nobody("-c", PLACES, ROOT, HOME=home)
    assert done.returncode == 0, done.stderr
    places = json.loads(done.stdout)
    private = f"{nobody.place}/zero-offload-trainer-{NOBODY}"
    for name in ("hub", "own", "plots", "triton", "config"):
        assert places[name].startswith(private), places
    assert os.path.isabs(places["home"]) and places["user"] == f"uid-{NOBODY}"
    assert private in done.stderr and "export XDG_CACHE_HOME" in done.stderr
    assert os.stat(private).st_mode & 0o777 == 0o700


def test_one_variable_moves_every_cache(nobody):
    cache = str(nobody.place / "mine")
    done = nobody("-c", PLACES, ROOT, XDG_CACHE_HOME=cache)
    places = json.loads(done.stdout)
    for name in ("hub", "own", "plots", "triton", "config"):
        assert places[name].startswith(cache), places
    assert "cannot be written" not in done.stderr


def test_a_directory_that_somebody_else_has_made(nobody):
    """In /tmp anybody can be first: then another one is taken."""
    planted = nobody.place / f"zero-offload-trainer-{NOBODY}"
    planted.mkdir(mode=0o777)
    done = nobody("-c", PLACES, ROOT)
    assert json.loads(done.stdout)["own"].startswith(f"{planted}-"), done.stdout


def test_no_place_at_all(nobody):
    code = (
        "import sys, tempfile; sys.path.insert(0, sys.argv[1])\n"
        "tempfile._candidate_tempdir_list = lambda: ['/proc']\n"
        "from trainer.config.command_line import command\n"
        "sys.exit(command(print)())"
    )
    done = nobody("-c", code, ROOT)
    assert done.returncode == 2 and "export XDG_CACHE_HOME=DIR" in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["plan", "doctor", "train"])
def test_commands_of_a_user_without_home(nobody, name):
    flags = PLAN if name == "plan" else ["--help"]
    done = nobody(ROOT / "launch" / f"{name}.py", *flags)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", ["train", "supervise", "plan", "data", "doctor", "export", "bench"]
)
def test_help_from_any_folder(tmp_path, name):
    """By path, through a link, and with a reader that has seen enough."""
    assert launch(name, "--help", cwd=tmp_path).returncode == 0
    script = f"{sys.executable} {ROOT}/launch/{name}.py --help | head -c 1"
    done = subprocess.run(script, shell=True, cwd=tmp_path, capture_output=True, timeout=60)
    assert not done.stderr, done.stderr


def test_a_printed_line_works_in_the_folder_where_it_is_printed(tmp_path):
    for folder in (ROOT, tmp_path):
        done = launch("plan", "--lora_rank", "1", cwd=folder)
        line = done.stderr.decode().partition("fix:")[2].partition(" lists")[0].strip()
        assert "plan.py --help" in line, done.stderr
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {**os.environ, "PATH": path}
        assert not subprocess.run(
            line, shell=True, cwd=folder, env=env, capture_output=True
        ).returncode


@pytest.mark.parametrize("name", ["train", "supervise", "plan", "data", "doctor", "export"])
def test_a_folder_that_has_been_removed(tmp_path, name):
    done = subprocess.run(
        f"rmdir {tmp_path} && exec {sys.executable} {ROOT}/launch/{name}.py --lerning_rate 1",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
    )
    assert done.returncode == 2 and b"directory has been removed" in done.stderr, done.stderr


def test_supervise_from_any_folder(tmp_path):
    """The ranks are started from there too; here they refuse the flag."""
    flags = ["--num_gpus", "1", "--lerning_rate", "1"]
    done = launch("supervise", *flags, cwd=tmp_path, env={"DS_ACCELERATOR": "cpu"})
    assert done.returncode == 2 and b"did you mean --learning_rate" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())
