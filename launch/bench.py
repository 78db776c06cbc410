"""Measure training beside the stock engine. Run as: python launch/bench.py train [CASE ...] | plot BENCH.jsonl"""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.bench import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
