"""Where data lies: a cache on a local disk, and files of s3://, gs://, https:// and file:// brought there. Imports no torch."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import time
import zlib
from pathlib import Path

from data import DataError, records

ATTEMPTS = 4  # of one download; the waits between them double from a second
NETWORK_FILESYSTEMS = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "gpfs",
    "ceph",
    "glusterfs",
    "beegfs",
    "fuse.s3fs",
    "fuse.gcsfuse",
    "9p",
    "afs",
)
_URL = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
}
_CREDENTIALS = {
    "s3fs": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or the machine's role",
    "gcsfs": "GOOGLE_APPLICATION_CREDENTIALS, or gcloud auth application-default login",
    "aiohttp": "an address that needs no login, such as a pre-signed one",
}


def is_url(path):
    """True for scheme://…"""
    return bool(_URL.match(str(path)))


def shown(url):
    """The address without what may be secret in it: user, password, query."""
    return re.sub(r"(?<=://)[^/@]*@", "", str(url)).partition("?")[0] if is_url(url) else str(url)


def filesystem_of(path):
    """Type of the file system under `path`, as /proc/mounts names it; "" where that is not known."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    best, kind = "", ""
    try:
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mount, type_, *_ = line.split()
            if len(mount) > len(best) and (
                path == Path(mount) or Path(mount) in path.resolve().parents
            ):
                best, kind = mount, type_
    except OSError:
        pass
    return kind


def cache_directory():
    """The data cache: $ZERO_OFFLOAD_CACHE, else ~/.cache/zero-offload-trainer/data, else, where that is a network disk, /var/tmp."""
    given = os.environ.get("ZERO_OFFLOAD_CACHE")
    if given:
        folder = Path(given)
    else:
        folder = (
            Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            / "zero-offload-trainer"
            / "data"
        )
        if filesystem_of(folder).startswith(NETWORK_FILESYSTEMS):
            folder = Path(f"/var/tmp/zero-offload-trainer-{os.getuid()}/data")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise DataError(
            f"the data cache {folder} cannot be made\n  found:  {error.strerror}\n  needed: a directory that can be "
            "written to; ZERO_OFFLOAD_CACHE names another one"
        ) from None
    # In /var/tmp somebody else may have come first.
    if not os.access(folder, os.W_OK) or (
        "/var/tmp/" in str(folder) and folder.parent.stat().st_uid not in (0, os.getuid())
    ):
        raise DataError(
            f"the data cache {folder} cannot be written to\n  needed: the right; ZERO_OFFLOAD_CACHE names another place"
        )
    return folder


@contextlib.contextmanager
def locked(key):
    """One process of this machine at a time. The lock is the kernel's: it ends with the process that held it."""
    import filelock

    folder = cache_directory() / "locks"
    folder.mkdir(exist_ok=True)
    with filelock.FileLock(folder / f"{digest(key)}.lock"):
        yield


def digest(*parts):
    """32 hex digits over the parts' text."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]


def content_hash(path):
    """SHA-256 of a file's content. Remembered by path, inode, size and times, so that the next rank does not read it again."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read\n  found:  {error.strerror}\n  needed: a file that is there"
        ) from None
    memo = (
        cache_directory()
        / "hashes"
        / digest(
            Path(path).absolute(),
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )
    )
    if memo.is_file() and re.fullmatch(rb"[0-9a-f]{64}", found := memo.read_bytes()):
        return found.decode()
    hashed = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**24):
                hashed.update(block)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read\n  found:  {error.strerror}\n  needed: the right to read it"
        ) from None
    write_atomically(memo, hashed.hexdigest().encode())
    return hashed.hexdigest()


def write_atomically(path, content):
    """The file complete, or not there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError as error:
        raise DataError(
            f"{path.parent} cannot be written to\n  found:  {error.strerror}\n  needed: space and the right to; "
            "ZERO_OFFLOAD_CACHE names another place for the data cache"
        ) from None


def checksums(folder):
    """{name: [bytes, crc32]} of the files of a folder, manifest.json left out."""
    result = {}
    for path in sorted(Path(folder).iterdir()):
        if path.name == "manifest.json":
            continue
        crc = 0
        with open(path, "rb") as file:
            while block := file.read(2**22):
                crc = zlib.crc32(block, crc)
        result[path.name] = [path.stat().st_size, crc]
    return result


def write_manifest(folder, manifest):
    """manifest.json of a cache entry, with the checksums of its files and of itself."""
    own = {"sum": digest(json.dumps(manifest)), "files": checksums(folder)}
    (folder / "manifest.json").write_text(json.dumps({**manifest, **own}))


def read_manifest(folder):
    """The manifest of a cache entry whose files are all there and unchanged; None where the entry is absent, half-written or
    damaged, which is said: it will be made again."""
    if not folder.exists():
        return None
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        own = {key: manifest.pop(key) for key in ("sum", "files")}
        if own == {"sum": digest(json.dumps(manifest)), "files": checksums(folder)}:
            return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    print(f"data cache: {folder} is damaged or half-written; made again", file=sys.stderr)
    return None


# -- remote files -----------------------------------------------------------------------------------------------------
def _filesystem(url):
    """(fsspec file system, path in it). DataError where the scheme is not known or its package is missing."""
    import fsspec

    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    package = _PACKAGES.get(scheme)
    if package is None and scheme != "file":
        raise DataError(
            f"{shown(url)}: the scheme {scheme}:// is not supported\n  needed: s3://, gs://, https:// or file://"
        )
    logging.getLogger("gcsfs").setLevel(
        logging.ERROR
    )  # it warns of each bucket whose kind it may not ask for
    try:
        return fsspec.core.url_to_fs(f"{scheme}://{rest}")
    except ImportError:
        raise DataError(
            f"{scheme}:// needs the package {package}\n  mend: pip install {package}, or make setup"
        ) from None


def _attempt(url, act, what):
    """act() with a bounded number of repetitions; DataError says what the last failure was, without credentials."""
    package = _PACKAGES.get(url.partition("://")[0].lower())
    for attempt in range(ATTEMPTS):
        try:
            return act()
        except DataError:
            raise
        except Exception as error:  # each backend raises its own kinds
            # fsspec's HTTP calls every failure FileNotFoundError; the one behind it knows the status.
            cause = (
                error.__cause__ or error.__context__
                if isinstance(error, FileNotFoundError) and package == "aiohttp"
                else None
            )
            error = cause or error
            status = getattr(error, "status", None) or getattr(error, "code", None)
            text = " ".join(str(error).split())
            kind = type(error).__name__
            needed = "an address that exists"
            lasting = isinstance(error, (FileNotFoundError, ValueError)) or status in (404, 410)
            if isinstance(error, OSError) and error.errno in (
                errno.ENOSPC,
                errno.EDQUOT,
                errno.EROFS,
            ):
                lasting, needed = (
                    True,
                    f"space in {cache_directory()}; ZERO_OFFLOAD_CACHE names another place",
                )
            if (
                isinstance(error, PermissionError)
                or status in (401, 403)
                or "credential" in f"{kind} {text}".lower()
            ):
                lasting, needed = (
                    True,
                    f"the right to read it: {_CREDENTIALS.get(package, 'credentials')}",
                )
            if lasting or attempt == ATTEMPTS - 1:
                found = re.sub(re.escape(url), shown(url), re.sub(r"\?\S+", "", text))[:200]
                tries = "" if lasting else f" after {ATTEMPTS} attempts"
                raise DataError(
                    f"{shown(url)} cannot be {what}{tries}\n  found:  {kind}: {found}\n  needed: {needed}"
                ) from None
            print(
                f"{shown(url)}: {kind}; attempt {attempt + 2} of {ATTEMPTS} in {2**attempt} s",
                file=sys.stderr,
            )
            time.sleep(2**attempt)
    return None


def expand(url):
    """The files that a remote address, glob or folder stands for, as addresses."""
    filesystem, path = _filesystem(url)
    scheme = url.partition("://")[0]
    if any(c in path for c in "*[") or (scheme not in ("http", "https") and "?" in path):
        found = _attempt(url, lambda: filesystem.glob(path), "listed")
    elif records.kind_of(path.partition("?")[0])[0] or scheme in ("http", "https"):
        return [url]
    else:
        found = _attempt(url, lambda: filesystem.find(path), "listed")
    found = sorted(p for p in found if records.kind_of(p)[0])
    if not found:
        raise DataError(f"no data file at {shown(url)}\n  needed: {records.READABLE}")
    return [filesystem.unstrip_protocol(p) for p in found]


def fetch(url):
    """A local copy of a remote file. One copy a version (ETag, size, time of change), made by one process."""
    import psutil

    filesystem, path = _filesystem(url)
    if url.lower().startswith("file://"):
        return Path(path)
    info = _attempt(url, lambda: filesystem.info(path), "read")
    if info.get("type") == "directory":
        raise DataError(
            f"{shown(url)} is a folder\n  needed: a file; a folder of http(s) cannot be listed"
        )
    version = [
        info.get(k)
        for k in (
            "ETag",
            "etag",
            "LastModified",
            "Last-Modified",
            "Content-MD5",
            "mtime",
            "updated",
        )
    ]
    if not any(version):  # nothing tells a change: one copy a run, whose ranks have the same parent
        process = os.getppid() if "LOCAL_RANK" in os.environ else os.getpid()
        version = [process, psutil.Process(process).create_time()]
    version.append(info.get("size"))
    name = Path(path.partition("?")[0]).name
    target = cache_directory() / "files" / digest(url, *version) / name
    with locked(target):
        if not target.is_file() or info.get("size") not in (None, target.stat().st_size):
            print(f"downloading {shown(url)}", file=sys.stderr)
            _attempt(url, lambda: _download(filesystem, path, target, info.get("size")), "read")
    return target


def _download(filesystem, path, target, size):
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + f".part{os.getpid()}")
    try:
        filesystem.get_file(path, str(partial))
        if size is not None and partial.stat().st_size != size:
            raise OSError(f"{partial.stat().st_size:,} of {size:,} bytes came")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
