"""Speed and memory of the data path: checking rows, tokenizing beside the bare tokenizer, packing.

    python tests/bench/data.py [--rows 1000000] [--model DIR]        (make bench-data)

Rows are alpaca rows of sentences from the bundled samples, about 300 tokens each. The cache is a
temporary one. Prints a table.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")


def generate(path, rows):
    """`rows` alpaca rows; lengths vary by a factor of ten or so."""
    rng = random.Random(0)
    lines = [
        json.loads(line)
        for line in (ROOT / "data" / "samples" / "train.jsonl").read_text().splitlines()
    ]
    sentences = [f"{r['instruction']} {r['output']}." for r in lines]
    with open(path, "w") as file:
        for i in range(rows):
            words = rng.lognormvariate(0, 0.6)
            count = max(1, round(9.3 * words))
            at = rng.randrange(len(sentences) - 60)
            body = " ".join(sentences[at : at + min(count, 60)])
            file.write(
                json.dumps(
                    {
                        "instruction": lines[i % len(lines)]["instruction"],
                        "input": "",
                        "output": f"{i} {body}",
                    }
                )
                + "\n"
            )


def peak():
    """Largest resident set of this process so far, GiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--model", help="directory with a tokenizer (default: the default model)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as work:
        os.environ["ZERO_OFFLOAD_CACHE"] = f"{work}/cache"
        run(Path(work), args)


def run(work, args):
    import numpy as np
    from tqdm import tqdm
    from transformers import AutoTokenizer

    from data import dataset, pack, source, template, tokenize
    from data.encoder import Encoder
    from trainer.system import default_model

    generate(work / "rows.jsonl", args.rows)
    (one,) = source.resolve([str(work / "rows.jsonl")])
    began = time.perf_counter()
    checked = source.check(one, lambda rows: tqdm(rows, unit=" rows", mininterval=5))
    seconds = time.perf_counter() - began
    print(
        f"check      {checked.accepted / seconds:12,.0f} rows/s   {seconds:7.1f} s   "
        f"peak RSS {peak():.2f} GiB",
        flush=True,
    )

    tokenizer = AutoTokenizer.from_pretrained(args.model or default_model.ensure())
    template.prepare_tokenizer(tokenizer)
    encoder = Encoder(tokenizer)

    def bare():
        """Tokens/s of encode_batch on the texts of 40,000 rows, rendering not counted."""
        rows = []
        for _, row in source.read(one):
            rows.append(row)
            if len(rows) == 40_000:
                break
        texts = [encoder.render(row).text for row in rows]
        begin, tokens = time.perf_counter(), 0
        for at in range(0, len(texts), tokenize.CHUNK):
            tokens += sum(
                len(e.ids)
                for e in encoder.backend.encode_batch(
                    texts[at : at + tokenize.CHUNK], add_special_tokens=False
                )
            )
        return tokens / (time.perf_counter() - begin)

    before = bare()
    began = time.perf_counter()
    file = tokenize.tokenized(one, encoder, lambda rows: tqdm(rows, unit=" rows", mininterval=5))
    seconds = time.perf_counter() - began
    tokens, ours = int(file.lengths.sum()), int(file.lengths.sum()) / seconds
    after = bare()
    print(
        f"tokenize   {ours:12,.0f} tokens/s {seconds:7.1f} s   peak RSS {peak():.2f} GiB   "
        f"{len(file):,} rows of {tokens / len(file):.0f} tokens\n"
        f"bare encode_batch, before and after: {before:,.0f} and {after:,.0f} tokens/s: "
        f"ours is {ours / ((before + after) / 2):.2f} of it",
        flush=True,
    )
    samples, _ = dataset.cut([file], np.ones(len(file), bool), 2048)
    began = time.perf_counter()
    packs = pack.best_fit(samples.lengths, 2048)
    seconds = time.perf_counter() - began
    print(
        f"pack       {len(samples) / seconds:12,.0f} rows/s   {seconds:7.1f} s   "
        f"fill {pack.fill(samples.lengths, 2048):.4f} ({int(packs.max()) + 1:,} packs)",
        flush=True,
    )
    began = time.perf_counter()
    sampler = dataset.BatchSampler(samples.lengths, 8, 1, 0, 1, 1, pack_length=2048)
    print(f"an epoch's order {time.perf_counter() - began:.1f} s", flush=True)
    batches = iter(sampler)
    began = time.perf_counter()
    for _ in range(50):
        dataset.collate([samples[numbers] for numbers in next(batches)], 0, 2048)
    print(
        f"a batch of 8 x 2,048 tokens {(time.perf_counter() - began) / 50 * 1e3:.1f} ms   "
        f"peak RSS {peak():.2f} GiB",
        flush=True,
    )


if __name__ == "__main__":
    main()
