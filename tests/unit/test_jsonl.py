"""Rows of a run: appended whole, read as far as they are rows, set aside byte for byte."""

import json
import os
import threading
from pathlib import Path

import pytest

from amclip_ds.errors import UserError
from amclip_ds.jsonl import STEP, append_line, read, read_lines, supersede

DAMAGED = [
    b'{"loss": 1.0}\n',
    b'{"step": "3"}\n',
    b'{"step": true}\n',
    b"[1, 2]\n",
    b'"step"\n',
    b"null\n",
    b"\xff\xfe{}\n",
    b'{"step": 2, "lo{"step": 3}\n',
    b"[" * 100_000 + b"\n",
    b'{"step": ' + b"9" * 5000 + b"}\n",
    b'{"step": 9223372036854775808}\n',
]


def test_a_line_separator_in_a_value_is_no_end_of_a_row(tmp_path: Path) -> None:
    rows = [{"step": step, "key": word} for step, word in enumerate(["a\u2028b", "c\u0085d", "e\x1cf", "g\vh\fi"])]
    for row in rows:
        append_line(tmp_path / "metrics.jsonl", row)
    assert read(tmp_path / "metrics.jsonl", STEP) == (rows, 0)
    assert supersede(tmp_path / "metrics.jsonl", 1) == 0
    assert read_lines(tmp_path / "metrics.jsonl") == rows[:2]
    assert read_lines(tmp_path / "metrics.superseded.jsonl") == rows[2:]


@pytest.mark.parametrize("damaged", DAMAGED, ids=lambda line: repr(line[:16]))
def test_what_is_no_row_is_counted_and_set_aside_byte_for_byte(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n', b'{"loss":2e0 , "step": 2}\n', b'{"step": 3}\n'
    path.write_bytes(whole[0] + damaged + whole[1] + whole[2])
    rows, unreadable = read(path, STEP)
    assert [row["step"] for row in rows] == [1, 2, 3] and unreadable == 1
    assert supersede(path, 2) == 1
    assert path.read_bytes() == whole[0] + whole[1]
    assert (tmp_path / "metrics.superseded.jsonl").read_bytes() == whole[2]
    assert (tmp_path / "metrics.unreadable.txt").read_bytes() == damaged
    assert supersede(path, 2) == 0 and (tmp_path / "metrics.unreadable.txt").read_bytes() == damaged  # once


def test_a_torn_tail_swallows_no_row(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    assert read(path, STEP) == ([{"step": 1}], 0)  # perhaps it is being written
    append_line(path, {"step": 3})
    assert read(path, STEP) == ([{"step": 1}, {"step": 3}], 1)
    path.write_bytes(b'{"step": 4}')  # only the end of the line is missing
    assert supersede(path, 0) == 0
    assert (tmp_path / "eval.superseded.jsonl").read_bytes() == b'{"step": 4}\n'


def test_blocks_of_nul_bytes_hide_no_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bytes(4096) + b'{"step": 2}\n' + bytes(100))
    assert read(path, STEP) == ([{"step": 1}, {"step": 2}], 0)


def test_several_writers_lose_no_row(tmp_path: Path) -> None:
    path = tmp_path / "incidents.jsonl"

    def write(writer: int) -> None:
        for number in range(100):
            append_line(path, {"writer": writer, "number": number, "text": "x" * 500})

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows, unreadable = read(path)
    assert len({(row["writer"], row["number"]) for row in rows}) == 400 and not unreadable


def test_nothing_is_appended_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine\n")
    (tmp_path / "eval.jsonl").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        append_line(tmp_path / "eval.jsonl", {"step": 1})
    assert victim.read_text() == "mine\n"


def test_a_pipe_in_the_place_of_a_file_blocks_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="metrics.jsonl: not an ordinary file"):
        read(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="not an ordinary file"):
        append_line(tmp_path / "metrics.jsonl", {"step": 1})


def test_values_that_are_not_finite_are_null_at_any_depth(tmp_path: Path) -> None:
    append_line(tmp_path / "eval.jsonl", {"step": 1, "metrics": {"acc1": float("nan"), "all": [float("inf"), 1.0]}})
    text = (tmp_path / "eval.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["metrics"] == {"acc1": None, "all": [None, 1.0]}


def test_a_line_without_end_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.write(b'{"step": 1}\n[')
        file.truncate(40 << 20)  # sparse
        file.seek(0, 2)
        file.write(b'\n{"step": 2}\n')
    assert read(path, STEP)[0] == [{"step": 1}, {"step": 2}]
    assert supersede(path, 5) > 0
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
