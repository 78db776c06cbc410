"""The image's health check: unhealthy where a run that lives has been silent for longer than the supervisor would wait for it.

A container without a run is healthy.
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.supervise import LIMITS, heartbeat, is_alive  # noqa: E402

late, seen = False, []
for path in sorted(Path("runs").glob("*/heartbeat.json")):
    try:
        beat = heartbeat(path.parent)
        alive = beat and is_alive(path.parent)
    except OSError:
        continue  # another user's run
    if alive:
        silent = time.time() - beat["time"]
        late |= silent > LIMITS.get(beat["phase"], LIMITS["load"])
        seen.append(f"{path.parent.name}: {beat['phase']}, last seen {silent:,.0f} s ago")
print("; ".join(seen) or "no run")
sys.exit(int(late))
