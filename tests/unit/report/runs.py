"""Run folders as the trainer's own writers leave them, for what would take hours to train."""

import json
import math
from pathlib import Path

from amclip_ds import config as settings
from amclip_ds.jsonl import append_line, encode
from amclip_ds.record import evaluation_lines

EPOCH = 1_790_000_000.0
NAMES = ("red circle", "blue <b>square</b>", "green star")


def metrics_row(step: int, attempt: int, at: float) -> dict:
    return {
        "step": step,
        "updates": step,
        "epoch": 0,
        "samples_seen": 64 * step,
        "attempt": attempt,
        "time": at,
        "loss": 5 + 5 * math.exp(-step / 40),
        "loss_contrastive": 4.0,
        "loss_o2o": 0.5,
        "loss_o2e": 0.25,
        "data_wait_s": 0.1,
        "step_s": 1.0,
        "communication_s": 0.2,
        "samples_per_s": 64.0,
        "lr": 1e-3 / step,
        "momentum": 0.99,
        "logit_scale": 14.2,
        "grad_norm": 3.0 + step % 7,
        "step_applied": True,
        "kept_tokens": 100,
    }


def event(run: Path, at: float, attempt: int, step: int, name: str, **facts: object) -> None:
    append_line(run / "timeline.jsonl", {"time": at, "attempt": attempt, "step": step, "event": name} | facts)


def incident(run: Path, at: float, attempt: int, step: int, kind: str, cause: str, **facts: object) -> None:
    append_line(
        run / "incidents.jsonl",
        {
            "time": at,
            "attempt": attempt,
            "step": step,
            "rank": 0,
            "kind": kind,
            "shard": "",
            "key": "",
            "cause": cause,
            "action": "",
        }
        | facts,
    )


def eventful(run: Path) -> Path:
    """100 steps: broken samples, a NaN, a preemption after step 40 of which 30 was saved, then half as many ranks.

    Attempt 0: 10 s before its start, 20 s to the first step, 40 steps of 1 s, a save of 2 s. 100 s of queue. Attempt
    1: 10 + 10 s of start, 70 steps, an evaluation of 5 s, end.
    """
    run.mkdir(parents=True)
    config = settings.load("aclip-tiny", ["data.train=scenes/train", "run.steps=100", f"run.out={run}"])
    (run / "config.yaml").write_text(settings.dump(config))
    words = ["/x/amclip_ds/__main__.py", "train", "aclip-tiny", "data.train=scenes/{0..3}.tar"]
    (run / "versions.json").write_text(json.dumps({"torch": "2.13.0", "git": None, "command": words}))
    t = EPOCH
    append_line(run / "attempts.jsonl", {"attempt": 0, "time": t, "command": words})
    event(
        run,
        t,
        0,
        0,
        "start",
        before_s=10.0,
        world_size=4,
        num_nodes=1,
        device="cuda",
        engine="zero2_bf16.json",
        job="77",
        restart=0,
    )
    event(run, t + 20, 0, 0, "training")
    for step in range(2, 31, 2):
        append_line(run / "metrics.jsonl", metrics_row(step, 0, t + 20 + step))
    for number in range(3):
        incident(
            run,
            t + 25,
            0,
            5,
            "broken image",
            "cannot be decoded",
            shard="/data/b.tar",
            key=f"00{number}",
            action="replaced by another sample",
        )
    event(run, t + 52, 0, 30, "save", seconds=1.5)
    event(run, t + 52.5, 0, 30, "save", seconds=0.25)
    event(run, t + 54.5, 0, 32, "commit", seconds=0.25)
    incident(
        run,
        t + 57,
        0,
        35,
        "non_finite_loss",
        "step 35: non-finite loss, from rank 1",
        key="17,18",
        action="skipped on all ranks",
    )
    for step in range(32, 41, 2):
        append_line(run / "metrics.superseded.jsonl", metrics_row(step, 0, t + 22 + step))
    event(run, t + 62, 0, 40, "end", code=75, reason="SIGTERM on rank 0; stopped after step 40")
    t += 172
    append_line(run / "attempts.jsonl", {"attempt": 1, "time": t, "command": words})
    event(
        run,
        t,
        1,
        0,
        "start",
        before_s=10.0,
        world_size=2,
        num_nodes=1,
        device="cuda",
        engine="zero2_bf16.json",
        job="77",
        restart=1,
    )
    event(run, t + 9, 1, 30, "resumed", checkpoint="checkpoints/step_00000030", world_size=4, stage=2)
    event(run, t + 10, 1, 30, "training")
    for step in range(32, 101, 2):
        append_line(run / "metrics.jsonl", metrics_row(step, 1, t + 10 + step - 30))
    event(run, t + 85, 1, 100, "evaluate", seconds=5.0)
    rows = [
        {
            "step": step,
            "weights": weights,
            "dataset": "pets",
            "task": "zeroshot_classification",
            "metrics": {"acc1": step / 200, "acc5": step / 100},
            "num_samples": 8,
            "main_metric": "acc1",
            "intervals": {"acc1": [0.4, 0.6]},
            "per_class": dict(zip(NAMES, ([1, 4], [4, 4], [0, 2]))),
            "confusions": [{"true": NAMES[0], "predicted": NAMES[2], "count": 3, "of": 4}],
            "confusion_matrix": [[1, 0, 3], [0, 4, 0], [2, 0, 0]],
        }
        for step in (50, 100)
        for weights in ("student", "teacher")
    ]
    for name, lines in evaluation_lines(rows).items():
        (run / name).write_bytes(lines)
    event(run, t + 85, 1, 100, "end", code=0, reason="done")
    (run / "exit.json").write_text(json.dumps({"code": 0, "step": 100, "attempt": 1, "reason": "done"}))
    (run / "out.log").write_text("2026-11-27 03:00:00 data: 6400 samples trained on, 3 skipped and replaced\n")
    return run


def long(run: Path, steps: int = 100_000, every: int = 1) -> Path:
    """A run with a row a step, and a save and an incident every hundred."""
    eventful(run)
    for name in ("metrics.jsonl", "incidents.jsonl"):
        (run / name).unlink()
    with (run / "metrics.jsonl").open("wb") as file:
        file.writelines(encode(metrics_row(step, 1, EPOCH + step)) for step in range(every, steps + 1, every))
    for step in range(100, steps + 1, 100):
        event(run, EPOCH + step, 1, step, "save", seconds=2.0)
    for step in range(100, steps + 1, 100):
        incident(
            run,
            EPOCH + step,
            1,
            step,
            "broken image",
            "cannot be decoded",
            shard=f"/data/{step % 40:05d}.tar",
            key=f"{step}",
            action="replaced by another sample",
        )
    return run
