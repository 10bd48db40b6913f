"""The distributions of a set of shards: sizes, aspects, bytes, captions, tokens; as numbers and as a picture."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from amclip_ds.data.captions import tokenizer_hash
from amclip_ds.data.check import CheckReport, token_lengths
from amclip_ds.masks.text.table import FORMAT
from amclip_ds.plots import pyplot
from amclip_ds.shards.grouping import IMAGE_TYPES

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
CONTEXT_LENGTH = 77


def summarise(report: CheckReport) -> dict[str, Any]:
    """{samples, formats, trimmed_captions, distributions: {name: {percentiles, mean}}, problems}."""
    columns = distributions(report)
    names = {number: suffix for suffix, number in reversed(IMAGE_TYPES.items())}
    kinds, counts = np.unique(report.measured()["format"], return_counts=True)
    return {
        "samples": report.total("read"),
        "shards": len(report.shards),
        "bytes": report.total("num_bytes"),
        "formats": {names[int(kind)]: int(count) for kind, count in zip(kinds, counts)},
        "trimmed_captions": summarise_tokens(report)["trimmed"],
        "percentiles": list(PERCENTILES),
        "distributions": {name: _summary(values) for name, values in columns.items()},
        "problems": dict(report.problems()),
    }


def distributions(report: CheckReport) -> dict[str, np.ndarray]:
    """A value a sample; of tokens, a value a caption of those kept for it."""
    rows = report.measured()
    width, height = rows["width"].astype(np.float64), rows["height"].astype(np.float64)
    return {
        "width": width,
        "height": height,
        "width / height": width / np.maximum(height, 1),
        "megapixels": width * height / 1e6,
        "image kilobytes": rows["image_bytes"] / 1e3,
        "captions": rows["captions"].astype(np.float64),
        "characters": rows["characters"].astype(np.float64),
        "tokens": np.array(list(token_lengths([t for shard in report.shards for t in shard.texts])), dtype=np.float64),
    }


def summarise_tokens(report: CheckReport) -> dict[str, Any]:
    """{captions, percentiles: {part: tokens}, trimmed}: of some captions of the whole set, start and end included."""
    tokens = distributions(report)["tokens"]
    found = dict(zip(map(str, PERCENTILES), _summary(tokens)["percentiles"]))
    trimmed = float((tokens > CONTEXT_LENGTH).mean()) if len(tokens) else 0.0
    return {"captions": len(tokens), "percentiles": found, "context_length": CONTEXT_LENGTH, "trimmed": trimmed}


def word_table(report: CheckReport) -> dict[str, Any]:
    """How often each word is in the captions, most frequent first: what data.text_mask.table names."""
    counts: Counter[str] = Counter()
    for shard in report.shards:
        counts.update(shard.words)
    ordered = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    return {"format": FORMAT, "tokenizer": tokenizer_hash(), "samples": report.total("read"), "counts": ordered}


def draw(report: CheckReport, file: Path) -> Path:
    """A histogram of each distribution, as one PNG."""
    plt = pyplot()
    columns = distributions(report)
    figure, axes = plt.subplots(2, len(columns) // 2, figsize=(4 * len(columns) // 2, 6))
    for axis, (name, values) in zip(axes.flat, columns.items()):
        if len(values):
            low, high = np.percentile(values, (0, 99.5))  # a few giants would squeeze everything else into one bar
            axis.hist(values, bins=40, range=(low, max(high, low + 1e-9)), color="#4477aa")
        if name == "tokens":
            axis.axvline(CONTEXT_LENGTH, color="#cc3311", linewidth=1)
        axis.set_title(name, fontsize=10)
        axis.set_yticks([])
    figure.suptitle(f"{report.total('read')} samples in {len(report.shards)} shards")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)
    return file


def _summary(values: np.ndarray) -> dict[str, Any]:
    if not len(values):
        return {"percentiles": [0.0] * len(PERCENTILES), "mean": 0.0}
    return {"percentiles": np.percentile(values, PERCENTILES).tolist(), "mean": float(values.mean())}
