"""What a terminal of 80 columns, a dumb one, one without colours and a pipe show: nothing is lost in any."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from amclip_ds.display import duration

TRAINING = """
import sys
from pathlib import Path
from amclip_ds.record import LogConfig, Record
folder = Path(sys.argv[1])
folder.mkdir()
row = {"updates": 1, "epoch": 0, "attempt": 0, "samples_seen": 64, "loss": 1.25, "loss_contrastive": 1.0, "lr": 1e-3,
       "logit_scale": 14.3, "samples_per_s": 10.0, "data_wait_s": 0.1, "step_s": 2.0, "peak_memory_gib": 3.5}
with Record(folder, LogConfig(every_steps=1, tensorboard=False), rank=0, world_size=1, attempt=0, total_steps=100,
            samples_per_epoch=1000, checkpoint_every=40) as record:
    for step in (1, 10):
        record.metrics({"step": step} | row, note="compute-bound (data 5%)")
    record.last_word(str(folder))
"""


def on_a_terminal(words: list[str], columns: int = 80, **env: str) -> str:
    """What a program writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns)} | env,
        )
        os.close(theirs)
        parts = []
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while part := os.read(ours, 1 << 16):
                parts.append(part)
        assert process.wait(60) == 0, b"".join(parts)
    finally:
        os.close(ours)
    return b"".join(parts).decode()


def explained() -> list[list[str]]:
    """Key, value and meaning of each key of a recipe, in a process that has no plug-in of another test."""
    said = "import json; from amclip_ds import config; print(json.dumps(config.explain(config.load('aclip-tiny'))))"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    return [[key, "null" if value is None else str(value), meaning] for key, value, meaning in rows]


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")


def test_no_cell_of_a_table_is_cut_at_80_columns() -> None:
    """Folded cells put together again are the keys and values of the recipe, every letter."""
    printed = plain(on_a_terminal(["-m", "amclip_ds", "recipes", "aclip-tiny"]))
    table = [line for line in printed.splitlines() if line.startswith("│")]
    assert table and all(len(line) <= 80 for line in table)
    rows = [line.split("│")[1:-1] for line in table]
    for column, texts in enumerate(zip(*explained())):
        shown = "".join("".join(row[column].split()) for row in rows)
        assert shown == "".join("".join(text.split()) for text in texts)


def test_in_a_pipe_a_row_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "amclip_ds", "recipes", "aclip-tiny"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "80"},
    )
    for key, value, said in explained():
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"│ {key} "))
        assert " ".join(said.split()) in " ".join(line.split()) and value in line


def test_a_live_line_has_all_one_asks_and_the_folder_comes_last(tmp_path: Path) -> None:
    printed = plain(on_a_terminal(["-c", TRAINING, str(tmp_path / "run")], columns=160))
    assert printed.strip().splitlines()[-1] == str(tmp_path / "run")
    live = next(line for line in printed.splitlines() if "10/100" in line and "loss" in line)
    for word in ("loss 1.250", "10 samples/s", "3.5 GiB", "ETA 3 min 0 s", "checkpoint in 60 s", "compute-bound"):
        assert word in live, live
    log = (tmp_path / "run" / "out.log").read_text()
    assert "Step: 10/100" in log and "| ETA 3 min 0 s, checkpoint in 60 s" in log


def test_a_dumb_terminal_shows_the_steps_as_lines(tmp_path: Path) -> None:
    printed = on_a_terminal(["-c", TRAINING, str(tmp_path / "run")], columns=400, TERM="dumb")
    assert "\x1b" not in printed and "Step: 1/100" in printed and "Step: 10/100" in printed


def test_no_color_is_read(tmp_path: Path) -> None:
    """The twin: without it there are colours."""
    colour = re.compile(r"\x1b\[[0-9;]*(3[0-9]|38;5;\d+)m")
    assert not colour.search(on_a_terminal(["-c", TRAINING, str(tmp_path / "a")], NO_COLOR="1"))
    assert colour.search(on_a_terminal(["-c", TRAINING, str(tmp_path / "b")]))


def test_durations() -> None:
    assert [duration(s) for s in (3.21, 90, 125, 7500, 200000)] == [
        "3.2 s",
        "90 s",
        "2 min 5 s",
        "2 h 5 min",
        "2 d 7 h",
    ]
