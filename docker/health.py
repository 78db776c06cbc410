"""The image's health check: unhealthy where a run that lives has been silent for longer than its supervisor would wait.

A container without a run is healthy; runs of other containers on the same mount are theirs.
"""

import json
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.supervise import heartbeat, patience  # noqa: E402
from trainer.system.swap_dir import is_held  # noqa: E402


def ours(lock):
    """Whether a process of this container holds it."""
    try:
        return (
            is_held(lock)
            and json.loads(lock.read_text() or "{}").get("host", socket.gethostname())
            == socket.gethostname()
        )
    except (OSError, ValueError):
        return False


late, seen = False, []
for path in sorted(Path("runs").glob("*/heartbeat.json")):
    run, beat = path.parent, heartbeat(path.parent)
    running, supervised = ours(run / ".running"), ours(run / ".supervised")
    if beat and (running or supervised):
        # A run that is started again has not yet replaced the heartbeat of before: it counts from its supervisor's start.
        silent = time.time() - max(
            beat["time"], (run / ".supervised").stat().st_mtime if supervised else 0
        )
        late |= silent > patience(run, beat["phase"])
        seen.append(f"{run.name}: {beat['phase']}, last seen {silent:,.0f} s ago")
print("; ".join(seen) or "no run")
sys.exit(int(late))
