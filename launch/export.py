"""Merge a run's LoRA adapter into its base model.

Run as: python launch/export.py --merge runs/NAME [--output DIR]
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.export.merge import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
