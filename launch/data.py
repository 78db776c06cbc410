"""Look at data before training: python launch/data.py check [FILE …] [--json] [--FLAG VALUE …]"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.data_check import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
