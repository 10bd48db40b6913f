"""The methods, and what each needs besides data, made by the commands that a user would type."""

from pathlib import Path

from amclip_ds.jsonl import read_lines
from amclip_ds.recipe_headers import all_headers
from tests.e2e.conftest import Amclip
from tests.recipes import words_of

FIRST_STAGES = {"flip-tune": "flip", "clipa-tune": "clipa-pre"}
METHODS = [header.method for header in all_headers()]


def pairs(shared_dir: Path) -> str:
    """The OpenStax pairs, as data.train takes them."""
    return f"{shared_dir}/data/openstax/train/{{00000..00003}}.tar"


def train(
    amclip: Amclip,
    shared_dir: Path,
    out: Path,
    method: str,
    *words: str,
    ranks: int = 2,
    steps: int = 3,
    options: tuple[str, ...] = (),
) -> list[dict]:
    """The rows of a short run over OpenStax pairs."""
    code, printed = amclip(
        "train",
        *options,
        f"{method}-tiny",
        f"data.train={pairs(shared_dir)}",
        f"run.out={out}",
        f"run.steps={steps}",
        "batch.global_size=16",
        "log.every_steps=1",
        *words,
        ranks=ranks,
        timeout_s=1200 if steps > 10 else 300,  # beside others on few cores
    )
    assert code == 0, printed
    return read_lines(out / "metrics.jsonl")


def needed(amclip: Amclip, shared_dir: Path, folder: Path, method: str) -> list[str]:
    """A teacher for those that learn from one, a first stage for a second, a table of words for those that go by it."""
    if not words_of(method):
        return []
    if method == "frequency":
        code, printed = amclip("data", "stats", pairs(shared_dir), "--words", f"{folder}/words.json")
        assert code == 0, printed
        return [f"data.text_mask.table={folder}/words.json"]
    if method in FIRST_STAGES:
        train(amclip, shared_dir, folder / "first", FIRST_STAGES[method], ranks=1)
        return [f"model.init_from={folder}/first"]
    train(amclip, shared_dir, folder / "teacher", "clip", ranks=1)
    return [f"distill.teacher={folder}/teacher"]
