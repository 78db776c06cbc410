"""What fits and how fast.

Run as: python launch/plan.py --model NAME [--method lora] [--gpus 8 --gpu_memory 80GB --ram 1TB …]
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.plan.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
