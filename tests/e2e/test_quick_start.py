"""docs/quick-start.md as a new user types it, in an empty folder, with smaller numbers."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_examples import PAGES

SMALLER = {"2000": "128", "500": "128", "run.steps=100": "run.steps=2"}


@pytest.mark.nightly
def test_the_quick_start_runs(tmp_path: Path) -> None:
    commands = [words for words in PAGES["docs/quick-start.md"] if words[0] != "doctor"]
    assert [words[0] for words in commands] == ["data", "data", "train", "report", "eval", "masks", "export"]
    for words in commands:
        words = [SMALLER.get(word, word) for word in words]
        done = subprocess.run([sys.executable, "-m", "amclip_ds", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
    assert (tmp_path / "runs/first/report.html").exists() and (tmp_path / "masks/masks.png").exists()
    assert (tmp_path / "exported/first/open_clip_config.json").exists()
