"""A data set that cannot be evaluated costs its own rows: never the run, the save that was due, nor a restart."""

from pathlib import Path

from amclip_ds.checkpoint import step_folders
from amclip_ds.jsonl import read_lines
from tests.e2e.conftest import Amclip
from tests.unit.evaluate.test_encoder import write_set


def test_a_failed_evaluation_is_an_incident_that_watch_makes_good(scenes: Path, tmp_path: Path, amclip: Amclip) -> None:
    run, broken = tmp_path / "run", write_set(tmp_path / "broken", num_images=8)
    tar = broken / "test" / "0.tar"
    whole = tar.read_bytes()
    at = whole.index(b"\x89PNG", whole.index(b"\x89PNG") + 1)  # the start reads the first
    tar.write_bytes(whole[:at] + bytes(64) + whole[at + 64 :])  # one image of rank 0's part
    train = (
        "train",
        "clip-tiny",
        f"data.train={scenes}/train",
        f"eval.data={broken}",
        f"run.out={run}",
        "run.steps=4",
        "batch.global_size=32",
        "data.workers=0",
        "eval.every_steps=2",
        "eval.batch_size=4",
        "checkpoint.every_steps=2",
    )

    code, printed = amclip(*train, ranks=2)
    assert code == 0 and "evaluation failed" in printed, printed
    assert [step for step, _ in step_folders.list_steps(run / "checkpoints")] == [2, 4]
    incidents = read_lines(run / "incidents.jsonl")
    assert [(row["kind"], row["step"]) for row in incidents] == [("evaluation_failed", 2), ("evaluation_failed", 4)]
    assert "0.tar" in incidents[0]["cause"] and not (run / "eval.jsonl").exists()

    code, printed = amclip(*train, ranks=2)  # again at step 4, of which there is no row
    assert code == 0, printed
    assert read_lines(run / "incidents.jsonl") == incidents

    code, printed = amclip("watch", str(run), "--once")  # it says so, and does not blame the checkpoints
    assert code == 2 and "2 evaluations could not be made, the first: " in printed and "0.tar" in printed, printed

    tar.write_bytes(whole)
    code, printed = amclip("watch", str(run), "--once")
    assert code == 0, printed
    assert [(row["step"], row["weights"]) for row in read_lines(run / "eval.jsonl")] == [(2, "student"), (4, "student")]
