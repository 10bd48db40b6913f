"""`amclip reproduce`: the first steps of a run again, bit for bit, from its own record, and from its capsule."""

import json
import tarfile
from pathlib import Path

import pytest

from amclip_ds.cli import main
from tests.e2e.conftest import Amclip


def findings(path: Path) -> dict[str, tuple[str, str]]:
    return {row["name"]: (row["status"], row["found"]) for row in json.loads(path.read_text())["findings"]}


def test_a_run_and_its_capsule(
    scenes: Path, tmp_path: Path, amclip: Amclip, capsys: pytest.CaptureFixture[str]
) -> None:
    run, reported = tmp_path / "run", tmp_path / "found.json"
    code, printed = amclip(
        "train",
        "random2x-tiny",
        f"data.train={scenes}/train",
        f"run.out={run}",
        "run.steps=3",
        "log.every_steps=1",
        "batch.global_size=16",
        "run.log_sample_ids=true",
    )
    assert code == 0, printed
    words = ["reproduce", str(run), "--steps", "2", "--json", str(reported), "--capsule", f"{tmp_path}/c.tar.gz"]
    assert main(words) == 0
    found = findings(reported)
    assert found["steps"] == ("ok", "2 recorded steps up to 2 on 1 ranks, every number the same")
    assert found["data"][0] == "ok" and found["world"][0] == "ok" and found["software"][0] == "ok"

    with tarfile.open(tmp_path / "c.tar.gz") as tar:
        tar.extractall(tmp_path / "there", filter="data")
    there = tmp_path / "there" / "c"
    assert {"config.yaml", "versions.json", "metrics.jsonl", "sample_ids.jsonl", "packages.txt", "README.txt"} <= {
        path.name for path in there.iterdir()
    }
    assert main(["reproduce", str(there), f"data.train={scenes}/train", "--json", str(reported)]) == 0
    assert findings(reported)["data"][0] == "ok"

    # The twin: numbers, data and software that are not the run's.
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[1]["loss"] += 1e-7
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    versions = json.loads((run / "versions.json").read_text())
    (run / "versions.json").write_text(json.dumps(versions | {"torch": "2.0.0", "git": "0" * 40}))
    assert main(["reproduce", str(run), f"data.train={scenes}/test", "--json", str(reported)]) == 2
    found = findings(reported)
    assert found["data"][0] == "fail" and found["revision"][0] == "warn"
    assert found["software"][0] == "fail" and "torch 2.0.0 -> " in found["software"][1]
    assert main(["reproduce", str(run), "--steps", "2", "--json", str(reported)]) == 2
    assert findings(reported)["steps"][1].startswith("1 numbers differ, the first: step 2 loss: ")


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", str(tmp_path)]) == 2
    assert "not a run's folder, nor an unpacked capsule" in capsys.readouterr().err
    assert main(["reproduce", str(tmp_path), "--steps", "0"]) == 2
