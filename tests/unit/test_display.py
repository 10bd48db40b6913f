"""A stranger's text is shown, never obeyed: on a screen, in a table, in a model card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from amclip_ds import config as settings
from amclip_ds import display
from amclip_ds.evaluate.source import Located
from amclip_ds.export.card import write_card
from amclip_ds.export.proof import Agreement, Proof
from tests.unit.data.shards import write_tar

EVIL = "cat\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.tac\u2028[red]x[/red] \x7f"


@pytest.mark.parametrize(
    "text",
    [
        chr(number)
        for number in (
            *range(9),
            *range(11, 32),
            *range(127, 160),
            0x202E,
            0x2066,
            0x200F,
            0xFEFF,
            0x2028,
            0xE0041,
            0xD800,
        )
    ],
)
def test_what_a_terminal_obeys_is_written_out(text: str) -> None:
    assert display.printable(f"a{text}b").isprintable() and display.printable(text).startswith("\\")


def test_what_people_write_stays(tmp_path: Path) -> None:
    """The twin."""
    for text in ("naïve café 東京 🚤", "👩\u200d👧", "a\tb\nc", "שלום", "[track] of {c}"):
        assert display.printable(text) == text
    assert display.one_line("a\nb\tc") == "a\\nb\\tc"


@pytest.mark.parametrize("text", ["a`b", "``", "`", "|a|b", "<img src=x>", "[x](http://y)", " ", "a\n\n# b", "**b**"])
def test_a_code_span_of_markdown_holds_anything(text: str) -> None:
    """No run of backticks inside is as long as its fence, and no newline or cell ends it."""
    span = display.code(text)
    fence = span[: len(span) - len(span.lstrip("`"))]
    inside = span[len(fence) : -len(fence)]
    assert span.endswith(fence) and "\n" not in span and fence not in inside.split(" ")
    assert "|" not in inside.replace("\\|", "")


def test_a_block_of_code_cannot_be_ended() -> None:
    lines = display.code_block("a\n```\n# b\n````", "yaml")
    assert lines[0] == "`````yaml" and lines[-1] == "`````"


def test_a_card_holds_no_markup_of_others(tmp_path: Path) -> None:
    evil = "x` | <script>alert(1)</script> [free](http://e.example) ```\n# Owned \x1b[2J"
    run = tmp_path / "run"
    run.mkdir()
    row = {"dataset": evil, "task": evil, "weights": "student", "step": 1, "num_samples": evil, "metrics": {evil: 0.5}}
    (run / "eval.jsonl").write_text(json.dumps(row) + "\n")
    config = settings.load("aclip-tiny", ["run.steps=1"])
    config.data.train = evil
    proof = Proof(evil, [Agreement(evil, 1.0, 0.0, "equal")], None, None)
    card = write_card("hf", Located(run, "run", ("student",), 1, run, config), "student", proof)
    assert "\x1b" not in card
    fence = ""
    for line in card.splitlines():
        if line.startswith("```"):
            fence = line.rstrip("yamlpthon") if not fence else "" if line == fence else fence
        elif not fence:
            assert not line.startswith("# Owned") and "<script>" not in spans_removed(line), line
            assert "](http" not in spans_removed(line), line


def test_a_card_says_how_many_rows_cannot_be_read(tmp_path: Path) -> None:
    config = settings.load("aclip-tiny", ["run.steps=1"])
    cards = []
    for content in ("", "no row\n{}\n"):
        (tmp_path / "eval.jsonl").write_text(content)
        located = Located(tmp_path, "run", ("student",), 1, tmp_path, config)
        cards.append(write_card("hf", located, "student", Proof("s", [Agreement("a", 1.0, 0.0, "equal")], None, None)))
    said = "2 line(s) of the run's eval.jsonl cannot be read and are left out."
    assert said not in cards[0] and said in cards[1]


def spans_removed(line: str) -> str:
    """The line without its code spans, as CommonMark pairs their backticks."""
    out, at = "", 0
    while at < len(line):
        if line[at] != "`":
            out, at = out + line[at], at + 1
            continue
        run = len(line[at:]) - len(line[at:].lstrip("`"))
        end = at + run
        while end < len(line):
            if line[end] == "`":
                closing = len(line[end:]) - len(line[end:].lstrip("`"))
                if closing == run:
                    break
                end += closing
            else:
                end += 1
        if end >= len(line):
            return out + line[at:]
        at = end + run
    return out


COMMANDS = {
    "an unknown recipe": ["recipes", EVIL],
    "a key": ["recipes", "aclip-tiny", f"{EVIL}=1"],
    "a folder": ["eval", f"/nowhere/{EVIL}", "--data", "x"],
    "a shard": ["data", "check", f"/nowhere/{EVIL}.tar"],
    "a run": ["checkpoints", f"/nowhere/{EVIL}"],
}


@pytest.mark.parametrize("typed", COMMANDS.values(), ids=COMMANDS)
def test_no_command_says_it_raw(typed: list[str], tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "amclip_ds", *typed], capture_output=True, timeout=300, cwd=tmp_path)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 2 and "Traceback" not in said, said
    assert all(line == display.printable(line) for line in said.splitlines()), said
    assert "\\x1b" in said


@pytest.mark.slow
def test_a_shard_s_names_and_texts_are_shown(tmp_path: Path) -> None:
    """A table and lines of `data`, about keys that a stranger chose."""
    shard = tmp_path / "00000.tar"
    write_tar(shard, {f"{EVIL}.jpg": b"no picture", f"{EVIL}.txt": EVIL.encode()})
    done = subprocess.run(
        [sys.executable, "-m", "amclip_ds", "data", "check", str(shard)],
        capture_output=True,
        timeout=300,
        env=os.environ | {"COLUMNS": "200"},
    )
    said = (done.stdout + done.stderr).decode()
    assert "\x1b" not in said and "\u202e" not in said and "Traceback" not in said, said


def test_a_table_shows_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    """rich would take them for markup."""
    display.print_table(("[track]",), [("[red]class[/red] \x1b[31m",), (5,)], title="[bold]x")
    said = capsys.readouterr().out
    assert "[red]class[/red] \\x1b[31m" in said and "[bold]x" in said and "\x1b" not in said


def test_a_screen_shows_what_a_print_holds(tmp_path: Path) -> None:
    """And rich's own colours pass by its other side."""
    with (tmp_path / "screen").open("wb") as file:
        screen = display.Screen(file, encoding="utf-8")
        print(EVIL, file=screen)
        screen.write_raw("\x1b[1mours\x1b[0m")
        screen.flush()
        assert (tmp_path / "screen").read_bytes().count(b"\x1b") == 2
