"""incidents.jsonl as the report holds it: folded row by row, since a run may list millions of samples."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from amclip_ds import run_files


@dataclass
class Alike:
    """Rows that the report shows as one."""

    first: dict[str, Any]
    count: int = 0
    until: int = 0
    """the last step of them"""

    def add(self, row: dict[str, Any]) -> None:
        self.count += 1
        self.until = max(self.until, row["step"])


class Incidents:
    """What the report says of incidents; `add` takes the rows of `each_once` in the order of the file."""

    def __init__(self) -> None:
        self.alike: dict[tuple[Any, ...], Alike] = {}
        """those of one attempt, kind and effect; of samples together, of others by their cause, whatever the step"""
        self.at_steps: Counter[tuple[str, int]] = Counter()
        """(kind, step) -> how many"""
        self.lost: dict[tuple[str, str], Alike] = {}
        """(shard, kind) -> samples, each once, however often a resume reports it again"""
        self._seen: set[int] = set()
        """hashes of (shard, kind, key), which take a tenth of the memory"""

    def add(self, row: dict[str, Any]) -> None:
        """Takes one row over."""
        shard, kind, key = str(row.get("shard") or ""), row["kind"], str(row.get("key") or "")
        key_of_row = (row["attempt"], kind, effect_of(row), is_of_a_sample(row) or cause_of(row))
        self.alike.setdefault(key_of_row, Alike(row)).add(row)
        self.at_steps[kind, row["step"]] += 1
        sample = hash((shard, kind, key))
        if shard and sample not in self._seen:
            self._seen.add(sample)
            self.lost.setdefault((shard, kind), Alike(row)).add(row)


def each_once(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of run_files.INCIDENT; what happened to a step's whole batch once, however many ranks have listed their
    samples of it."""
    seen: set[tuple[int, int, str]] = set()
    for row in rows:
        if row["kind"] in run_files.OF_A_BATCH:
            key = row["attempt"], row["step"], row["kind"]
            if key in seen:
                continue
            seen.add(key)
        yield row


def cause_of(row: dict[str, Any]) -> str:
    """Why it happened, without the step, which has its own column and would make each another cause."""
    return str(row["cause"]).removeprefix(f"step {row['step']}: ")


def effect_of(row: dict[str, Any]) -> str:
    """What was done about it."""
    return str(row.get("action") or "")


def is_of_a_sample(row: dict[str, Any]) -> bool:
    """Whether it is one sample's, of which a run may have many."""
    return effect_of(row).startswith("replaced") or bool(row.get("shard"))
