"""Fine-tune a model and keep the run alive.

Run as: python launch/supervise.py [--num_gpus N] [--detach] [--FLAG VALUE ...]
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.supervise import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
