"""Fine-tune a model.

Run as: deepspeed launch/train.py --deepspeed NAME.json [--config RECIPE.yaml] [--FLAG VALUE ...]
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.run import leave, main  # noqa: E402

if __name__ == "__main__":
    leave(main())
