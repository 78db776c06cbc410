"""The image's health check: unhealthy where a run that lives has been silent for longer than its supervisor would wait.

A container without a run is healthy.
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.supervise import heartbeat, is_alive, patience  # noqa: E402

late, seen = False, []
for path in sorted(Path("runs").glob("*/heartbeat.json")):
    run = path.parent
    try:
        beat = heartbeat(run)
        alive = beat and is_alive(run)
    except OSError:
        continue  # another user's run
    if alive:
        silent = time.time() - beat["time"]
        late |= silent > patience(run, beat["phase"])
        seen.append(f"{run.name}: {beat['phase']}, last seen {silent:,.0f} s ago")
print("; ".join(seen) or "no run")
sys.exit(int(late))
