"""What a disk does by itself, past the page cache, in 16 threads and blocks of 4 MiB.

python tests/bench/disk.py FILE [GiB]: reads, writes, and as many of both at once.
"""

import mmap
import os
import sys
import threading
import time

BLOCK, THREADS = 2**22, 16


def rate(handle, blocks, kinds):
    """Return GB/s of all kinds: "r" reads the first half of the file, "w" writes the other."""
    todo = iter([(kind, i) for i in range(blocks) for kind in kinds])
    lock, failed = threading.Lock(), []

    def work():
        buffer = memoryview(mmap.mmap(-1, BLOCK))
        while not failed:
            with lock:
                kind, i = next(todo, (None, 0))
            if kind is None:
                return
            call = os.preadv if kind == "r" else os.pwritev
            done = call(handle, [buffer], (i + blocks * (kind == "w")) * BLOCK)
            if done != BLOCK:
                failed.append(done)

    began = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise OSError(f"a transfer of {failed[0]} bytes")
    return len(kinds) * blocks * BLOCK / (time.perf_counter() - began) / 1e9


def main(path, gib="4"):
    """Print the rates."""
    blocks = int(float(gib) * 2**30) // BLOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
    try:
        os.posix_fallocate(handle, 0, 2 * blocks * BLOCK)
        first, page = memoryview(mmap.mmap(-1, BLOCK)), os.urandom(BLOCK)
        first[:] = page
        for i in range(2 * blocks):  # what was never written is not read from a disk
            os.pwritev(handle, [first], i * BLOCK)
        figures = {kinds: rate(handle, blocks, kinds) for kinds in ("w", "r", "rw")}
        again = rate(handle, blocks, "rw")
    finally:
        os.close(handle)
        os.unlink(path)
    print(
        f"written {figures['w']:.2f} GB/s, read {figures['r']:.2f}, both at once "
        f"{figures['rw']:.2f} and {again:.2f}, of both together"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
