"""Other trainers' words: the table that answers them and docs/open-clip.md agree, and name keys that exist."""

import re
from pathlib import Path

import pytest

from amclip_ds import config, synonyms
from amclip_ds.cli import main

TABLE = Path(__file__).resolve().parents[2] / "docs" / "open-clip.md"
OPTIONS = {"--procs", "--resume", "--nodes", "--gpus-per-node", "--time"}


def named(text: str) -> set[str]:
    """The keys and options that a text names."""
    keys = config.keys_and_types()
    return {key for key in keys if re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.]\w)", text)} | {
        option for option in OPTIONS if option in text
    }


def rows() -> list[tuple[set[str], str]]:
    """(open_clip's flags, what is beside them) of each row of the table in docs/open-clip.md."""
    table = TABLE.read_text().split("| open_clip | here | |")[1].split("\n\n")[0]
    cells = [line.split("|")[1:4] for line in table.splitlines()[2:]]
    return [
        ({synonyms.normalise(flag) for flag in re.findall(r"--[\w-]+", theirs)}, ours + note)
        for theirs, ours, note in cells
    ]


def test_the_readme_and_the_table_agree() -> None:
    assert set.union(*(flags for flags, _ in rows())) == synonyms.OPEN_CLIP.keys() | synonyms.UNNEEDED.keys()
    for flags, ours in rows():
        for flag in flags & synonyms.OPEN_CLIP.keys():
            assert named(synonyms.OPEN_CLIP[flag]) & named(ours), (flag, ours)


@pytest.mark.parametrize("table", [synonyms.OPEN_CLIP, synonyms.OTHERS])
def test_every_answer_names_what_there_is(table: dict[str, str]) -> None:
    for word, ours in table.items():
        assert named(ours) or "the first word" in ours, (word, ours)
        assert word == synonyms.normalise(word) and word not in config.keys_and_types()


def test_what_is_suggested_is_never_applied(capsys: pytest.CaptureFixture[str]) -> None:
    for word in (*synonyms.OPEN_CLIP, *synonyms.OTHERS, *synonyms.UNNEEDED):
        if word not in {key.split(".")[0] for key in config.keys_and_types()}:
            assert main(["recipes", "aclip-tiny", f"{word}=1"]) == 2
            assert f"amclip recipes: {word}: unknown key; " in capsys.readouterr().err


@pytest.mark.parametrize(
    "word, suggested",
    [
        ("optim.learning_rate", "optim.lr?"),
        ("optim.wd", "optim.weight_decay?"),
        ("run.name", "run.out?"),
        ("trainer.max_epochs", "run.epochs?"),
        ("LR", "optim.lr?"),
        ("optim.lrr", "optim.lr?"),
        ("keep_ratio", "mask.keep_ratio?"),
        ("data.name", None),
        ("foo.bar", None),
        ("model.vision.name2", "model.vision.name?"),
    ],
)
def test_suggestions(word: str, suggested: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "aclip-tiny", f"{word}=1"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith(f"did you mean {suggested}" if suggested else "lists all keys"), said
