"""The data cache on a local disk, and remote files (s3://, gs://, https://) brought there.

Imports no torch.
"""

import errno
import hashlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from data import records
from data.errors import RunError, disk_errors, one_line
from data.files import hash_file, locked, new_file, user_cache, write_atomically

ATTEMPTS = 4  # of one download; the waits between them double from a second
# What the names of their types begin with.
NETWORK_FILESYSTEMS = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "gpfs",
    "ceph",
    "glusterfs",
    "beegfs",
    "orangefs",
    "fuse",  # sshfs, s3fs, gcsfuse, rclone and the like; none of them is a disk
    "virtiofs",
    "9p",
    "afs",
)
_URL = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_AWS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or the machine's role"
_GOOGLE = "GOOGLE_APPLICATION_CREDENTIALS, or gcloud auth application-default login"
_WEB = "an address that needs no login, such as a pre-signed one"
# What gives the right to read, by scheme.
_CREDENTIALS = {
    "s3": _AWS,
    "s3a": _AWS,
    "gs": _GOOGLE,
    "gcs": _GOOGLE,
    "http": _WEB,
    "https": _WEB,
    "file": "credentials",
}
# Where file systems tell the version of a file.
_VERSION_KEYS = (
    "ETag",
    "etag",
    "LastModified",
    "Last-Modified",
    "Content-MD5",
    "mtime",
    "updated",
)
_OTHER_CACHE = "ZERO_OFFLOAD_CACHE names another place"

T = TypeVar("T")


def is_url(path: str) -> bool:
    """Return whether it is scheme://…"""
    return bool(_URL.match(path))


def shown(path: str) -> str:
    """Return a path or address without the address's secrets: user, password and query."""
    return re.sub(r"(?<=://)[^/@]*@", "", path).partition("?")[0] if is_url(path) else path


# -- the cache -------------------------------------------------------------------------------------
def filesystem_of(path: str | Path) -> str:
    """Return the type of the path's file system, as the kernel names it, or "" if unknown.

    Of a path that does not exist: that of the nearest directory above it.
    """
    path = Path(os.path.realpath(path))  # unlike Path.resolve it knows links in a circle
    while not os.path.exists(path):
        path = path.parent
    try:
        # The kernel says which mount it is: names with blanks, binds and mounts over mounts need no
        # thought of ours.
        handle = os.open(path, os.O_PATH)
        try:
            about = Path(f"/proc/self/fdinfo/{handle}").read_text(encoding="utf-8")
        finally:
            os.close(handle)
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        return mount_type(mounts, about.partition("mnt_id:")[2].split()[0])
    except (OSError, IndexError):
        return ""


def mount_type(mountinfo: str, number: str) -> str:
    """Return the type of the mount of this number in the text of /proc/<pid>/mountinfo, or ""."""
    for line in mountinfo.splitlines():
        if line.startswith(f"{number} "):
            return line.partition(" - ")[2].split()[0]
    return ""


def cache_directory() -> Path:
    """Return the data cache; it is made where it is missing. Raise RunError where that fails.

    It is $ZERO_OFFLOAD_CACHE, or ~/.cache/zero-offload-trainer/data, or where that is a network
    disk a directory in /var/tmp.
    """
    given = os.environ.get("ZERO_OFFLOAD_CACHE")
    directory = Path(given or user_cache() / "data")
    if not given and filesystem_of(directory).startswith(NETWORK_FILESYSTEMS):
        directory = Path(f"/var/tmp/zero-offload-trainer-{os.getuid()}/data")
    needed = f"a directory that can be written to; {_OTHER_CACHE}"
    with disk_errors(f"the data cache {directory} cannot be written to", needed=needed):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        # In /var/tmp somebody else may have come first.
        shared = directory.is_relative_to("/var/tmp")
        foreign = shared and directory.parent.stat().st_uid not in (0, os.getuid())
        if foreign or not os.access(directory, os.W_OK):
            raise PermissionError("no right to write")
    return directory


def lock_of(key: object) -> Path:
    """Return the lock file of a key in the cache."""
    return cache_directory() / "locks" / f"{digest(key)}.lock"


def digest(*parts: object) -> str:
    """Return 32 hex digits over the parts' text."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]


def sealed(value: Any) -> str:
    """Return the value as JSON with a checksum."""
    text = json.dumps(value)
    return f"{digest(text)}\n{text}"


def unsealed(path: Path) -> Any:
    """Return the value of a sealed file, or None where it is missing, half-written or damaged."""
    try:
        checksum, _, text = path.read_text(encoding="utf-8").partition("\n")
        return json.loads(text) if checksum == digest(text) else None
    except (OSError, ValueError):
        return None


def remembered(kind: str, key: str, make: Callable[[], Any]) -> Any:
    """Return make(), from the cache where a rank or a run made it before. It must be JSON."""
    path = cache_directory() / kind / key
    with locked(lock_of(path)):
        value = unsealed(path)
        if value is None:
            value = make()
            needed = f"space and the right to write; {_OTHER_CACHE}"
            with disk_errors(f"{path.parent} cannot be written to", needed=needed):
                write_atomically(path, sealed(value), durable=False)
    return value


def content_hash(path: Path) -> str:
    """Return the hash of a file's bytes. Raise RunError where it cannot be read.

    It is remembered by path, inode, size and times, so that the next rank does not read the file.
    """
    with disk_errors(f"{path} cannot be read", needed="a file that can be read"):
        status = os.stat(path)
        key = digest(
            path.absolute(), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )
        return remembered("hashes", key, lambda: hash_file(path))


def _checksums(directory: Path) -> dict[str, str]:
    """Return {name: hash} of the files but manifest.json."""
    return {
        path.name: hash_file(path) for path in directory.iterdir() if path.name != "manifest.json"
    }


def write_manifest(directory: Path, content: dict) -> None:
    """Write manifest.json: the content, and the checksums of the directory's files."""
    manifest = sealed({"content": content, "files": _checksums(directory)})
    (directory / "manifest.json").write_text(manifest, encoding="utf-8")


def read_manifest(directory: Path) -> dict | None:
    """Return the content of manifest.json, or None where the directory must be made again.

    It must where it is absent, half-written or damaged; damage is printed.
    """
    if not directory.exists():
        return None
    manifest = unsealed(directory / "manifest.json")
    if manifest and manifest["files"] == _checksums(directory):
        return manifest["content"]
    print(f"data cache: {directory} is damaged or half-written; made again", file=sys.stderr)
    return None


# -- remote files ----------------------------------------------------------------------------------
def _filesystem(url: str) -> tuple[Any, str]:
    """Return (fsspec file system, path in it). Raise RunError for an unknown scheme."""
    import fsspec

    scheme, rest = _scheme(url), url.partition("://")[2]
    if scheme not in _CREDENTIALS:
        raise RunError(
            f"{shown(url)}: the scheme {scheme}:// is not supported",
            needed="s3://, gs://, https:// or file://",
        )
    # It warns of each bucket whose kind it may not ask for.
    logging.getLogger("gcsfs").setLevel(logging.ERROR)
    try:
        return fsspec.core.url_to_fs(f"{scheme}://{rest}")
    except ImportError as error:
        raise RunError(
            f"{scheme}:// needs another package", found=error, fix="make setup"
        ) from None


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()


def _attempt(url: str, act: Callable[[], T], what: str) -> T:
    """Return act(), with ATTEMPTS attempts. Raise RunError that shows no credentials.

    what: what is done to the address, for the error: "read" or "listed".
    """
    attempt = 1
    while True:
        try:
            return act()
        except Exception as error:  # each backend raises its own kinds
            cause: BaseException = error
            if _scheme(url).startswith("http") and isinstance(error, FileNotFoundError):
                # fsspec gives that name to every failure; the one behind it knows the status.
                cause = error.__cause__ or error.__context__ or error
        needed, kind = _needed(cause, url), type(cause).__name__
        if needed or attempt == ATTEMPTS:
            tries = "" if needed else f" after {ATTEMPTS} attempts"
            found = re.sub(r"\?\S+", "", str(cause)).replace(url, shown(url))
            raise RunError(
                f"{shown(url)} cannot be {what}{tries}",
                found=f"{kind}: {one_line(found, 200)}",
                needed=needed or "an address that exists",
            ) from None
        wait = 2 ** (attempt - 1)
        attempt += 1
        print(f"{shown(url)}: {kind}; attempt {attempt} of {ATTEMPTS} in {wait} s", file=sys.stderr)
        time.sleep(wait)


def _needed(error: BaseException, url: str) -> str | None:
    """Return what is needed where trying again does not help, else None."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if (
        isinstance(error, PermissionError)
        or status in (401, 403)
        or "credential" in f"{type(error).__name__} {error}".lower()
    ):
        return f"the right to read it: {_CREDENTIALS[_scheme(url)]}"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return f"space in {cache_directory()}; {_OTHER_CACHE}"
    if isinstance(error, (FileNotFoundError, ValueError)) or status in (404, 410):
        return "an address that exists"
    return None


def expand(url: str) -> list[str]:
    """Return the addresses of the files that a remote address, glob or folder stands for."""
    filesystem, path = _filesystem(url)
    is_web = _scheme(url).startswith("http")
    signs = "*[" if is_web else "*[?"  # on the web a ? begins the query
    search = filesystem.glob
    if not any(sign in path for sign in signs):
        if is_web or records.kind_of(path.partition("?")[0]):
            return [url]
        search = filesystem.find
    files = sorted(filter(records.kind_of, _attempt(url, lambda: search(path), "listed")))
    if not files:
        raise RunError(f"no data file at {shown(url)}", needed=records.READABLE)
    return [filesystem.unstrip_protocol(file) for file in files]


def fetch(url: str) -> Path:
    """Return a local copy of a remote file. Each version is copied once, by one process."""
    import psutil

    filesystem, path = _filesystem(url)
    if _scheme(url) == "file":
        return Path(path)
    info = _attempt(url, lambda: filesystem.info(path), "read")
    if info.get("type") == "directory":
        raise RunError(
            f"{shown(url)} is a folder", needed="a file; a folder of http(s) cannot be listed"
        )
    version = [info.get(key) for key in _VERSION_KEYS]
    if not any(version):  # nothing tells a change: one copy a run, whose ranks have the same parent
        process = os.getppid() if "LOCAL_RANK" in os.environ else os.getpid()
        version = [process, psutil.Process(process).create_time()]
    size = info.get("size")
    name = Path(path.partition("?")[0]).name
    target = cache_directory() / "files" / digest(url, *version, size) / name

    def download() -> None:
        with new_file(target) as partial:
            filesystem.get_file(path, str(partial))
            received = partial.stat().st_size
            if size not in (None, received):
                raise OSError(f"{received:,} of {size:,} bytes came")

    with locked(lock_of(target)):
        if not target.is_file() or size not in (None, target.stat().st_size):
            print(f"downloading {shown(url)}", file=sys.stderr)
            _attempt(url, download, "read")
    return target
