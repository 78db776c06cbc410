"""What `data check` reports of the files: rows, tokens, refusals, packing fill, and examples with the trained tokens in colour."""

import numpy as np

from data import pack

COLOURS = {"trained": "\033[32m", "off": "\033[0m", "dim": "\033[2m"}
EXAMPLES = 2
LINES = 10  # refused rows and notes that are shown of a file


def _tokens(file):
    if not len(file):
        return {"p50": 0, "p95": 0, "max": 0}
    p50, p95 = np.percentile(file.lengths, [50, 95], method="higher")
    return {"p50": int(p50), "p95": int(p95), "max": int(file.lengths.max())}


def report(sources, files, samples, max_length):
    """The object that --json prints. samples: data.dataset.Samples of all files at max_length.

    rows: those accepted; trained_share: of all their tokens, before any cut; truncated: rows of more than max_length tokens.
    """
    entries = []
    for source, file in zip(sources, files):
        total = int(file.lengths.sum(dtype=np.int64))
        trained = total - len(file) if samples.train_on_prompt else file.trained_tokens
        entries.append(
            {
                "path": source.shown,
                "format": source.format,
                "rows": len(file),
                "rejected": [{"line": e["line"], "reason": e["reason"]} for e in file.rejected()],
                "tokens": _tokens(file),
                "trained_share": round(trained / total, 4) if total else 0.0,
                "truncated": int((file.lengths > max_length).sum()),
                "notes": [{"line": line, "text": text} for line, text in file.manifest["notes"]],
            }
        )
    return {"files": entries, "packing_fill": round(pack.fill(samples.lengths, max_length), 4)}


def text(result, max_length):
    """The report for people."""
    lines = []
    for entry in result["files"]:
        t = entry["tokens"]
        lines += [
            f"{entry['path']}",
            f"  format {entry['format'] or 'unknown'}, {entry['rows']:,} rows, {len(entry['rejected']):,} rejected",
            f"  tokens a row: {t['p50']:,} median, {t['p95']:,} p95, {t['max']:,} longest; "
            f"{entry['truncated']:,} longer than max_length {max_length:,}",
            f"  {entry['trained_share']:.1%} of the tokens are trained",
        ]
        for key, word in (("rejected", "reason"), ("notes", "text")):
            shown = entry[key][:LINES]
            lines += [f"  {entry['path']}:{e['line']}: {e[word]}" for e in shown]
            if len(entry[key]) > len(shown):
                lines.append(f"  … and {len(entry[key]) - len(shown):,} more")
    lines.append(f"packing fills {result['packing_fill']:.1%} of rows of {max_length:,} tokens")
    return "\n".join(lines)


def example(tokenizer, samples, index, colour):
    """One sample as text, trained tokens in green, or between ⟦ ⟧ where there is no colour."""
    ids, labels = samples[index]
    begin, end = (COLOURS["trained"], COLOURS["off"]) if colour else ("⟦", "⟧")
    borders = np.flatnonzero(np.diff((labels >= 0).astype(int))) + 1
    parts = []
    for piece, trained in zip(np.split(ids, borders), np.split(labels >= 0, borders)):
        written = tokenizer.decode(
            piece.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        parts.append(f"{begin}{written}{end}" if len(trained) and trained[0] else written)
    return "".join(parts)
