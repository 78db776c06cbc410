"""What this machine gives: its disk, GPU, PCIe and RAM.

Run as: python launch/bench.py io [DIRECTORY] | machine
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.measure import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
