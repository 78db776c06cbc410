"""Make the bundled instruction set from WordNet 3.0.

    apt-get install wordnet-base
    python tests/data/make_samples.py   # writes data/samples/train.jsonl and validation.jsonl

Every row is about one headword: "what does it mean", with WordNet's gloss as the answer. Where
WordNet quotes the word in a sentence, half of those rows give the sentence as `input` and ask for
the meaning there.

Nothing leaks from train into validation: a headword, its sense (synset) and its gloss each occur
in one split only, and the split is decided on the headword before any question is phrased. The
output is the same on every machine.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

Row = dict[str, str]

SAMPLES = Path(__file__).parents[2] / "data" / "samples"

SUFFIX = {"noun": "noun", "verb": "verb", "adjective": "adj", "adverb": "adv"}
TRAIN_ROWS, VALIDATION_ROWS = 2400, 80

PLAIN = [
    "What does the {pos} '{word}' mean?",
    "Define the {pos} '{word}'.",
    "Give a dictionary definition of '{word}' ({pos}).",
    "How would a dictionary explain the {pos} '{word}'?",
    "I came across the {pos} '{word}'. What is its meaning?",
    "Explain briefly what '{word}' means as {article} {pos}.",
]
IN_SENTENCE = [
    "What does the {pos} '{word}' mean in this sentence?",
    "Define '{word}' as it is used here.",
    "Read the sentence and give the meaning of the {pos} '{word}'.",
    "Which sense does '{word}' have in the following sentence?",
]


def digest(text: str) -> int:
    """Return a number that depends on the text alone, so that choices do not depend on the run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def usage_counts(folder: Path) -> dict[tuple[str, str], int]:
    """Return {(lemma, part of speech): how often WordNet's corpora tag it}.

    It is a measure of how common a word is.
    """
    kinds = {"1": "noun", "2": "verb", "3": "adjective", "4": "adverb", "5": "adjective"}
    counts = {}
    for line in (folder / "cntlist.rev").read_text().splitlines():
        key, _, count = line.split()
        lemma, _, sense = key.partition("%")
        counts[lemma, kinds[sense[0]]] = counts.get((lemma, kinds[sense[0]]), 0) + int(count)
    return counts


def first_senses(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yield (part of speech, lemma, gloss, example sentence or "") of every word.

    They are those of its most frequent sense.
    """
    for pos, suffix in SUFFIX.items():
        glosses = {}
        for line in (folder / f"data.{suffix}").read_text().splitlines():
            if not line.startswith("  "):  # the licence header is indented
                glosses[line.split(" ", 1)[0]] = line.partition(" | ")[2]
        for line in (folder / f"index.{suffix}").read_text().splitlines():
            if line.startswith("  "):
                continue
            fields = line.split()
            gloss = glosses[fields[-int(fields[2])]]  # synsets come last, the most frequent first
            word = fields[0].replace("_", " ")
            quotes = re.findall(r'"([^"]+)"', gloss)
            quote = next(
                (q for q in quotes if re.search(rf"\b{re.escape(word)}", q, re.IGNORECASE)), ""
            )
            yield pos, fields[0], gloss.split('; "')[0].strip(), quote


def build(folder: Path) -> tuple[list[Row], list[Row]]:
    """Return (train rows, validation rows).

    The most used headwords are taken, one row for each headword and each gloss.
    """
    counts = usage_counts(folder)
    candidates = [
        (counts.get((lemma, pos), 0), digest(f"{lemma}{pos}"), pos, lemma, gloss, quote)
        for pos, lemma, gloss, quote in first_senses(folder)
        if lemma.isascii() and len(lemma) > 2 and 12 <= len(gloss) <= 160 and '"' not in gloss
    ]
    candidates.sort(key=lambda c: (-c[0], c[1]))
    seen, rows = set(), []
    for _, _, pos, lemma, gloss, quote in candidates:
        if lemma in seen or gloss in seen:
            continue
        seen.update((lemma, gloss))
        rows.append((pos, lemma, gloss, quote))
        if len(rows) == TRAIN_ROWS + VALIDATION_ROWS:
            break
    held_out = {
        lemma
        for _, lemma, _, _ in sorted(rows, key=lambda r: digest("split" + r[1]))[:VALIDATION_ROWS]
    }
    rows.sort(key=lambda r: digest("order" + r[1]))
    train = [phrase(*row) for row in rows if row[1] not in held_out]
    validation = [phrase(*row) for row in rows if row[1] in held_out]
    return train, validation


def phrase(pos: str, lemma: str, gloss: str, quote: str) -> Row:
    """Return one instruction row. The gloss stays as WordNet has it."""
    word = lemma.replace("_", " ")
    choice = digest("phrase" + lemma)
    article = "an" if pos[0] == "a" else "a"
    if quote and choice % 2:
        question = IN_SENTENCE[choice // 2 % len(IN_SENTENCE)]
        return {"instruction": question.format(word=word, pos=pos), "input": quote, "output": gloss}
    question = PLAIN[choice // 2 % len(PLAIN)]
    return {
        "instruction": question.format(word=word, pos=pos, article=article),
        "input": "",
        "output": gloss,
    }


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--wordnet",
        type=Path,
        default=Path("/usr/share/wordnet"),
        help="folder with WordNet's data files",
    )
    parser.add_argument("--output", type=Path, default=SAMPLES, help="where to write the two files")
    args = parser.parse_args()
    for name, rows in zip(("train", "validation"), build(args.wordnet)):
        path = args.output / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
