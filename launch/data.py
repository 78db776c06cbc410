"""Look at data before training. Run as: python launch/data.py check [FILE ...] [--model_name_or_path MODEL] [--json]"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.data_check import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
