"""What differs between a checkpoint's run and the present one, and whether it would change training results.

A change that would is refused unless checkpoint.allow_drift names its key; then it is recorded.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from amclip_ds import plain_yaml
from amclip_ds.engine.ds_config import EngineConfig, read_ds_config
from amclip_ds.errors import UserError
from amclip_ds.model.savings import Savings

# Whole sections and keys that decide where and how fast a run computes, what it keeps, waits for and shows, but none of
# its numbers (but for the order of roundings). The data is compared by the index's hash, the stage and precision by the
# engines' own account. tests/unit/checkpoint/test_drift.py lists the others: a new key belongs into one of the two.
FREE_SECTIONS = ("checkpoint", "log", "eval", "watchdog", "preemption", "ownership")
FREE = {
    *("run.out", "run.time_limit", "run.log_sample_ids", "run.deterministic", "run.profile"),
    *("batch.per_gpu", "engine.deepspeed", "engine.compile", "engine.allow_untested", "engine.flat_gradients"),
    "teacher.placement",
    *(f"engine.savings.{item.name}" for item in fields(Savings)),
    *("model.init_from", "model.vision.checkpoint_every", "model.text.checkpoint_every", "loss.chunk", "loss.exchange"),
    *("guards.max_skipped", "guards.max_rewinds"),
    *(
        "data.train",
        "data.text_mask.table",
        "data.index",
        "data.workers",
        "data.prefetch",
        "data.timeout_s",
        "data.stage_dir",
        "data.stage_gb",
    ),
    *("data.allow_pipe", "data.max_skip_rate", "data.on_change", "data.text_bucket"),
}
DEEPSPEED = "engine.deepspeed"
AT_THE_START = {"model.init_from"}  # free at a resume alone, which has its weights from the checkpoint
HASH_KEYS = {  # a hash of the manifest -> the key that names it
    "data": "data.train",
    "contents": "data.train",
    "tokenizer": "data.tokenizer",
    "words": "data.text_mask.table",
    "excluded": "data.exclude",
    "teacher": "distill.teacher",
}

ABSENT = "(absent)"
EXCLUDE = "data.exclude"
PLUGINS = "plugins"  # names and hashes of what --plugin brought


@dataclass(frozen=True)
class Change:
    """One key that differs."""

    key: str
    saved: str
    present: str
    is_free: bool

    def __str__(self) -> str:
        return f"{self.key}: {self.saved} -> {self.present}"


def compare(saved: dict[str, str], present: dict[str, str], defaults: Mapping[str, str] | None = None) -> list[Change]:
    """The differences of two flat configs.

    defaults: what keys that this version or a plug-in has added mean where the saved config does not have them yet.
    """
    saved = {key: value for key, value in (defaults or {}).items() if key in present} | saved
    return [
        Change(key, saved.get(key, ABSENT), present.get(key, ABSENT), is_free(key))
        for key in sorted(saved.keys() | present.keys())
        if saved.get(key) != present.get(key)
    ]


def is_free(key: str) -> bool:
    return key in FREE or key.partition(".")[0] in FREE_SECTIONS


def decides(key: str, one: str, other: str) -> bool:
    """Whether a run from its first step on comes to other numbers by another value of the key."""
    if key == DEEPSPEED:
        return precision_of(one) != precision_of(other)
    return key in AT_THE_START or not is_free(key)


def precision_of(deepspeed: str) -> str:
    """Of a DeepSpeed file: bf16 or fp32; its name where it is there no more."""
    try:
        ds = read_ds_config(EngineConfig(deepspeed=deepspeed, allow_untested=True))
    except UserError:
        return deepspeed
    return "bf16" if ds.get("bf16", {}).get("enabled") else "fp32"


def changes_between(
    saved_config: str,
    config: str,
    saved_hashes: dict[str, str],
    hashes: dict[str, str],
    saved_precision: str,
    precision: str,
    default_config: str = "",
) -> list[Change]:
    """All that differs between two runs: keys, data, tokenizer, precision. Raises UserError for what is unreadable.

    default_config: config.yaml of this version with every key at its default.
    """
    changes = compare(flatten(saved_config), flatten(config), flatten(default_config) if default_config else None)
    for name, key in HASH_KEYS.items():
        if name in saved_hashes and name in hashes and saved_hashes[name] != hashes[name]:
            changes.append(Change(key, f"content {saved_hashes[name][:12]}", f"content {hashes[name][:12]}", False))
    if saved_precision != precision:
        changes.append(Change(DEEPSPEED, saved_precision, precision, False))
    return changes


def allowances(allow_drift: list[str], on_change: str) -> dict[str, str]:
    """The keys that may differ -> the setting that allows it."""
    by_content = {EXCLUDE: EXCLUDE}  # somebody has checked samples, and wants them out: recorded, from which step on
    by_content |= {"data.train": "data.on_change=report"} if on_change == "report" else {}
    return by_content | dict.fromkeys(allow_drift, "checkpoint.allow_drift")


def refuse_or_allow(changes: list[Change], allowed: Collection[str]) -> list[Change]:
    """The changes of training results that were allowed by name. Raises UserError listing those that were not."""
    numeric = [change for change in changes if not change.is_free]
    refused = [change for change in numeric if change.key not in allowed]
    if refused:
        keys = ",".join(sorted({change.key for change in refused}))
        missing = next((change for change in refused if change.key == PLUGINS and change.present == ABSENT), None)
        advice = f"; add --plugin: {missing.saved} is not loaded" if missing else ""
        raise UserError(
            f"the checkpoint's run differs in what changes training results: {'; '.join(map(str, refused))}"
            f" (checkpoint.allow_drift=[{keys}] continues anyway){advice}"
        )
    return numeric


def flatten(config: str, source: str = "the checkpoint's config.yaml") -> dict[str, str]:
    """A config.yaml as dotted key -> value. source: what to blame. Raises UserError."""
    tree = plain_yaml.parse(config, source) or {}
    return {key: _text(value) for key, value in _leaves(tree, "")}


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, list) and node and all(isinstance(item, dict) for item in node):  # sections, such as data.views
        for place, item in enumerate(node):
            own = _leaves(item, f"{prefix}.{place}")
            yield from ((key, value) for key, value in own if value not in (None, "", {}))  # those left out are no keys
        return
    if node == []:  # no item, no key
        return
    if not isinstance(node, dict) or not node:
        yield prefix, node
        return
    for key, value in node.items():
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))


def _text(value: Any) -> str:
    """A leaf as text; what is in a list is no key of its own."""
    return "[" + ", ".join(map(_text, value)) + "]" if isinstance(value, list) else str(value)
