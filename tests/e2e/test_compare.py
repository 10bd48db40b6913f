"""`amclip compare` as a user types it: runs, one table, and what the same command does again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.nightly
def test_a_comparison_comes_to_its_table_and_resumes(scenes: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "amclip_ds",
        "compare",
        "clip-tiny",
        "random2x-tiny",
        f"data.train={scenes}/train",
        f"eval.data={scenes}",
        "batch.global_size=16",
        "--budget",
        "steps=4",
        "--out",
        str(tmp_path / "cmp"),
    ]

    def run(*more: str) -> tuple[list[str], dict]:
        done = subprocess.run(
            [*words, *more, "--json", f"{tmp_path}/cmp.json"],
            capture_output=True,
            text=True,
            timeout=3000,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        trained = [line for line in done.stdout.splitlines() if line.startswith("compare: run ")]
        return trained, json.loads((tmp_path / "cmp.json").read_text())

    trained, found = run("--seeds", "1")
    assert len(trained) == 2 and [row["seeds"] for row in found["summary"]] == [1, 1]
    assert {row["recipe"] for row in found["rows"]} == {"clip-tiny", "random2x-tiny"}
    assert all(0 <= row["metrics"]["acc1"] <= 1 and row["step_s"] > 0 for row in found["rows"])
    assert (tmp_path / "cmp" / "compare.png").stat().st_size > 1000
    assert run("--seeds", "1") == ([], found), "whole runs are read"
    shutil.rmtree(tmp_path / "cmp" / "clip-tiny-seed0")
    trained, again = run("--seeds", "1")
    assert len(trained) == 1 and "clip-tiny" in trained[0]
    assert again["rows"][0]["metrics"] == found["rows"][0]["metrics"], "the same seed, the same numbers"
