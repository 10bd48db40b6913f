"""A comparison as a Slurm array (slurm/compare.sbatch): what each task trains, the table when the last one is over."""

import json
import re
from typing import Any

from amclip_ds.arguments import plugin_words
from amclip_ds.compare.compare import Comparison, plan_runs, show
from amclip_ds.compare.runs import Row
from amclip_ds.compare.table import read_outcome
from amclip_ds.errors import UserError
from amclip_ds.files import not_written, write_atomically

NOTES = "array"
"""in OUT: a file a task that is over, with the exit code of its run"""


def words_of(ask: Comparison, task: int, tasks: int) -> list[str]:
    """RECIPE and key=value words of a task's run, as train.sbatch takes them; none where it is whole. Raises UserError
    for an array of another length, since its table would never come."""
    runs = plan_runs(ask, _unmeasured)
    if tasks != len(runs):
        raise UserError(f"--array: {tasks} tasks, and there are {len(runs)} runs: --array=0-{len(runs) - 1}")
    run = runs[task]
    if read_outcome(run).is_whole:
        return []
    words = [run.row.recipe, *run.words, *plugin_words(ask.plugins)]
    for word in words:
        if not word.isprintable():  # a word a line goes to compare.sbatch
            raise UserError(f"{word!r}: holds a line end or control character")
    return words


def ended(ask: Comparison, task: int, code: int) -> tuple[dict[str, Any], int]:
    """Notes how a task's run ended; after the last one prints the table and writes its files, as `compare` does."""
    runs, folder = plan_runs(ask, _unmeasured), ask.out / NOTES
    try:
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"{task}.json", json.dumps({"run": runs[task].folder.name, "code": code}) + "\n")
    except OSError as error:
        raise not_written(f"--out {ask.out}:", error) from None
    if not all((folder / f"{number}.json").exists() for number in range(len(runs))):
        return {}, 0
    result = show(runs, ask.baseline, ask.out)  # of two tasks that end together both write the same
    return result, 0 if all(read_outcome(run).is_whole for run in runs) else 1


def read_ended(text: str) -> tuple[int, int]:
    """TASK=CODE. Raises UserError."""
    if not re.fullmatch(r"\d{1,5}=\d{1,3}", text):
        raise UserError(f"--ended {text}: expected TASK=CODE")
    task, _, code = text.partition("=")
    return int(task), int(code)


def _unmeasured(row: Row, ask: Comparison) -> float:
    raise UserError("--budget seconds=: an array times no steps first; give steps=, samples= or flops=")
