"""Is this machine ready to train? Run as: python launch/doctor.py [--json] [--io] [--nvme]"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.doctor.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
