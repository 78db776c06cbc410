"""The user that runs us: places for caches where the home directory has none. No torch."""

import os
import pwd
import stat
import tempfile
from pathlib import Path

from data.files import user_cache
from trainer.console import to_stderr
from trainer.distributed import is_main_process
from trainer.errors import RunError
from trainer.system import hardware

# Where libraries keep files that is below HOME, and not below XDG_CACHE_HOME: {variable: folder}.
_BELOW_HOME = {
    "TRITON_HOME": "triton",
    "MPLCONFIGDIR": "matplotlib",
    "XDG_CONFIG_HOME": "config",  # W&B
    "XDG_DATA_HOME": "data",
}


def prepare() -> None:
    """Give every cache a place that this user can write to, and the user a name.

    A container may run as any user id: without an entry in the password file, and with HOME=/.
    Then caches go to $XDG_CACHE_HOME, or to a private directory in the temporary directory, which
    is said. What is readable of an old cache of models stays in use.
    Raises RunError where the working directory is gone, which names of files start from.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        what = "the working directory has been removed"
        raise RunError(what, fix="cd to one that exists") from None
    if not _has_name() and not any(os.environ.get(n) for n in ("LOGNAME", "USER", "LNAME")):
        os.environ["USER"] = f"uid-{os.getuid()}"  # getpass.getuser(), torch's compiler
    home = Path(os.path.expanduser("~"))
    if home.is_absolute() and _can_make(home / ".cache"):
        return
    if not os.environ.get("XDG_CACHE_HOME"):
        place = _private_directory()
        if is_main_process():
            to_stderr(
                f"HOME={os.environ.get('HOME', '')} cannot be written to: caches are in {place} "
                "(elsewhere: export XDG_CACHE_HOME=DIR)"
            )
        os.environ["XDG_CACHE_HOME"] = str(place)
        for name, part in (("HF_HUB_CACHE", "hub"), ("HF_TOKEN_PATH", "token")):
            old = home / ".cache" / "huggingface" / part
            if os.access(old, os.R_OK):
                os.environ.setdefault(name, str(old))
    caches = user_cache().parent
    for name, folder in _BELOW_HOME.items():
        os.environ.setdefault(name, str(caches / folder))
    if not home.is_absolute():  # no HOME and no entry: libraries would make a folder named ~
        os.environ["HOME"] = str(caches)


def _has_name() -> bool:
    try:
        return bool(pwd.getpwuid(os.getuid()))
    except KeyError:
        return False


def _can_make(path: Path) -> bool:
    """Return whether this user can write to a directory, or make it."""
    nearest = hardware.existing(path)
    return os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK)


def _private_directory() -> Path:
    """Return a directory that nobody else can write to, the same one in every process."""
    try:
        path = Path(tempfile.gettempdir(), f"zero-offload-trainer-{os.getuid()}")
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
        is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
        if is_ours and not status.st_mode & 0o022:
            return path
        return Path(tempfile.mkdtemp(prefix=f"{path.name}-"))  # somebody else's is there
    except OSError as error:
        raise RunError(
            "there is no place for caches",
            found=f"HOME={os.environ.get('HOME', '')}; {error.strerror or error}",
            needed="a directory that this user can write to: models, compiled ops, tokenised data",
            fix="export XDG_CACHE_HOME=DIR; all caches are below it then",
        ) from None
