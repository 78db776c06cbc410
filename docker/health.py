"""The image's health check: unhealthy where a living run is silent for longer than is allowed.

The limit is that of its supervisor, or the phase's. A container without a run is healthy. Runs of
other containers on the same mount do not count.
"""

import json
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.files import is_locked  # noqa: E402
from trainer.run_dir import all_runs  # noqa: E402


def is_ours(lock: Path) -> bool:
    """Return whether a process of this container holds the lock."""
    host = socket.gethostname()
    try:
        return (
            is_locked(lock)
            and json.loads(lock.read_text(encoding="utf-8") or "{}").get("host", host) == host
        )
    except (OSError, ValueError):
        return False


def main() -> int:
    """Print the runs of this container. Return 1 where one is silent for too long, else 0."""
    late, lines = False, []
    for run in all_runs():
        beat = run.read_heartbeat()
        supervised = is_ours(run.supervisor_lock)
        if not beat or not (supervised or is_ours(run.rank_lock)):
            continue
        # A restarted run has not replaced its old heartbeat yet: count from its supervisor's start.
        started = run.supervisor_lock.stat().st_mtime if supervised else 0
        silent = time.time() - max(beat["time"], started)
        late |= silent > run.silence_limit(beat["phase"])
        lines.append(f"{run.path.name}: {beat['phase']}, last seen {silent:,.0f} s ago")
    print("; ".join(lines) or "no run")
    return int(late)


if __name__ == "__main__":
    sys.exit(main())
