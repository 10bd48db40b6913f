"""Resumes as a user meets them: `amclip train` cut in mid-epoch, on other worlds, after drift and damage."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from amclip_ds import config as settings
from amclip_ds.checkpoint import manifest, step_folders
from amclip_ds.data.captions import tokenizer_hash
from amclip_ds.data.synthetic import write_dataset
from amclip_ds.evaluate.source import locate
from amclip_ds.jsonl import read_lines
from amclip_ds.method import method_of
from amclip_ds.run import open_data
from amclip_ds.shards.index import build_index, default_folder
from tests.e2e.trainers import last_of_each
from tests.harness import run_ranks
from tests.unit.checkpoint.damage import flip

SMALL = [
    "model.vision.depth=1",
    "model.text.depth=1",
    "batch.global_size=24",
    "data.workers=0",
    "log.every_steps=1",
    "log.tensorboard=false",
    "run.log_sample_ids=true",
    "run.deterministic=true",
    "checkpoint.keep_last=100",
    "optim.warmup_steps=4",
]
OF_THE_MACHINE = {
    "attempt",
    "samples_per_s",
    "data_wait_s",
    "communication_s",
    "step_s",
    "time",
    "tflops",
    "mfu",
    "peak_memory_gib",
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 scenes: an epoch is 8 batches of 24."""
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    write_dataset(folder, 200, 8, 64, 0)
    return folder / "train"


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 scenes: an epoch is 4 batches of 24."""
    folder = tmp_path_factory.mktemp("few") / "scenes"
    write_dataset(folder, 100, 8, 64, 0)
    return folder / "train"


def amclip(*argv: str, ranks: int = 1) -> tuple[int, str]:
    words = last_of_each(["train", "aclip-tiny", *argv])
    results = run_ranks("tests.e2e.cases:command", world_size=ranks, timeout_s=400, argv=words)
    assert len({code for code, _ in results}) == 1, results
    return results[0]


def numbers(run: Path) -> list[dict[str, Any]]:
    rows = read_lines(run / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in OF_THE_MACHINE} for row in rows]


def hashes(checkpoint: Path) -> dict[str, str]:
    """Of every file that holds state."""
    files = manifest.verify(checkpoint).files
    return {name: facts["sha256"] for name, facts in files.items() if name != "config.yaml"}


def check_cut(scenes: Path, folder: Path, total: int, cut: int, ds: str) -> list[str]:
    """An uninterrupted run of `total` steps, and one that resumes from its step `cut`: the same in every record."""
    keys = [
        f"data.train={scenes}",
        f"run.steps={total}",
        f"checkpoint.every_steps={cut}",
        *SMALL,
        f"engine.deepspeed={ds}",
    ]
    whole, rest = folder / "whole", folder / "rest"
    code, printed = amclip(*keys, f"run.out={whole}", ranks=2)
    assert code == 0, printed
    place = whole / "checkpoints" / step_folders.folder_name(cut)
    code, printed = amclip(*keys, f"run.out={rest}", "--resume", str(place), ranks=2)
    assert code == 0, printed
    assert numbers(rest) == numbers(whole)[cut:] and len(numbers(rest)) == total - cut
    assert read_lines(rest / "sample_ids.jsonl") == read_lines(whole / "sample_ids.jsonl")[cut:]
    last = step_folders.folder_name(total)
    assert hashes(rest / "checkpoints" / last) == hashes(whole / "checkpoints" / last)
    return keys


def test_a_cut_in_mid_epoch_and_another_world(few_scenes: Path, tmp_path: Path) -> None:
    """The next epoch begins two steps after the cut."""
    keys = check_cut(few_scenes, tmp_path, total=6, cut=2, ds="zero2_bf16.json")
    whole = tmp_path / "whole"
    place = whole / "checkpoints" / step_folders.folder_name(2)
    other = tmp_path / "other"
    code, printed = amclip(
        *keys,
        "engine.deepspeed=zero3_bf16.json",
        "batch.per_gpu=6",
        f"run.out={other}",
        "--resume",
        str(place),
        ranks=3,
    )
    assert code == 0, printed
    assert read_lines(other / "sample_ids.jsonl") == read_lines(whole / "sample_ids.jsonl")[2:], "the order of samples"
    assert "batch arithmetic: 24 = 2 ranks x 12, 12 at a time, there, = 3 ranks x 8, 4 at a time, now" in printed
    there, here = numbers(whole)[2], numbers(other)[0]
    assert (here["lr"], here["momentum"], here["step"], here["updates"]) == (there["lr"], there["momentum"], 3, 3)
    assert abs(here["loss"] - there["loss"]) < 0.02 * there["loss"]


def test_no_other_rank_asks_for_the_checkpoints_folder_before_it_is_there(few_scenes: Path, tmp_path: Path) -> None:
    """Its node would remember for seconds that there is none, and its ranks' part of the first save would fail."""
    run, why = tmp_path / "run", "the part runs uncompiled (why)"
    words = last_of_each(["train", "aclip-tiny", f"data.train={few_scenes}", f"run.out={run}", "run.steps=1", *SMALL])
    case = {"argv": words, "of": str(run / "checkpoints"), "uncompiled": why}
    asked = run_ranks("tests.e2e.cases:asked_in_vain", world_size=2, timeout_s=400, **case)
    assert not asked[1] and (run / "checkpoints" / step_folders.folder_name(1)).is_dir()
    [row] = read_lines(run / "incidents.jsonl")
    assert (row["rank"], row["kind"], row["cause"]) == (1, "uncompiled", why)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ds", ["zero1_fp32.json", "zero2_bf16.json", "zero3_bf16.json"])
def test_a_cut_after_13_of_40_steps(ds: str, scenes: Path, tmp_path: Path) -> None:
    check_cut(scenes, tmp_path, total=40, cut=13, ds=ds)


@pytest.mark.nightly
def test_a_resume_needs_no_first_weights(scenes: Path, tmp_path: Path) -> None:
    """model.init_from is read by a fresh start alone: a month later its file may be gone."""
    keys = [f"data.train={scenes}", "run.steps=2", *SMALL]
    assert amclip(*keys, f"run.out={tmp_path}/first")[0] == 0
    start = tmp_path / "start.safetensors"
    (tmp_path / "first" / "student.safetensors").rename(start)
    keys += [f"run.out={tmp_path}/run", f"model.init_from={start}"]
    code, printed = amclip(*keys)
    assert code == 0 and "parameters from" in printed, printed
    start.unlink()
    code, printed = amclip(*keys, "run.steps=3", "checkpoint.allow_drift=[run.steps]")
    assert code == 0 and "resumes from" in printed, printed
    code, printed = amclip(*keys, f"run.out={tmp_path}/fresh")
    assert code == 2 and "model.init_from: no such file" in printed, "the twin: a fresh start does need it"


def test_a_spike_rewinds_to_the_checkpoint_and_the_data_continue(scenes: Path, tmp_path: Path) -> None:
    """With no deviation allowed, the first loss above the others is a spike."""
    run = tmp_path / "run"
    code, printed = amclip(
        f"data.train={scenes}",
        "run.steps=30",
        "checkpoint.every_steps=2",
        *SMALL,
        f"run.out={run}",
        "guards.spike=rewind",
        "guards.spike_window=2",
        "guards.spike_deviations=0.001",
        "guards.max_rewinds=1",
    )
    assert code in (0, 3) and "rewound to the weights of step_" in printed, printed
    rows = numbers(run)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "no step is there twice"
    behind = [after["updates"] <= before["updates"] for before, after in zip(rows, rows[1:])]
    assert any(behind), "the applied updates went back"
    ids = [i for row in read_lines(run / "sample_ids.jsonl") for i in row["ids"]][:192]
    assert len(set(ids)) == len(ids), "no batch is read again"


def test_a_rewind_is_no_step_and_no_hang_and_needs_no_newest_save(few_scenes: Path, tmp_path: Path) -> None:
    """Reading a checkpoint has the time of a resume, and the save under way may fail: an older one is there."""
    run, wait_s = tmp_path / "run", 8.0
    words = [f"data.train={few_scenes}", "run.steps=12", "checkpoint.every_steps=1", *SMALL, f"run.out={run}"]
    words += ["guards.spike=rewind", "guards.spike_window=2", "guards.spike_deviations=0.001", "guards.max_rewinds=1"]
    words += ["batch.global_size=8", "optim.lr=1e-9", "watchdog.step_timeout_s=5"]  # its losses go up and down
    words = last_of_each(["train", "aclip-tiny", *words])
    [(code, printed)] = run_ranks("tests.e2e.cases:rewound", world_size=1, timeout_s=400, argv=words, wait_s=wait_s)
    assert code in (0, 3) and "rewound to the weights of step_00000001" in printed, printed
    assert "checkpoint_failed" in [row["kind"] for row in read_lines(run / "incidents.jsonl")]
    waits = [row for row in read_lines(run / "timeline.jsonl") if row["event"] == "resume" and row["seconds"] >= wait_s]
    assert len(waits) == 1 and waits[0]["step"] > 1
    assert 0 < min(of := [row["step_s"] for row in read_lines(run / "metrics.jsonl")]) <= max(of) < wait_s


def test_a_shard_that_changed_under_one_rank_stops_the_run_with_3(few_scenes: Path, tmp_path: Path) -> None:
    """Rank 1 alone reads it, and leaves the verdict; rank 0 hears only that it is gone."""
    shards, run = Path(shutil.copytree(few_scenes, tmp_path / "data")), tmp_path / "run"
    words = [*SMALL, f"data.train={shards}", f"run.out={run}", "run.steps=8", "checkpoint.every_steps=1"]
    paths = tuple(sorted(map(str, shards.glob("*.tar"))))
    build_index(list(paths), default_folder(paths), 1)
    config = settings.load("aclip-tiny", last_of_each(words))
    ranks = SimpleNamespace(rank=1, world_size=2, device=torch.device("cpu"))
    with closing(open_data(config, method_of(config), ranks)) as data:  # type: ignore[arg-type]
        stream = data.batches(None)
        third = [next(stream) for _ in range(3)][-1]
        sample = data.index.sample(int(third.sample_ids[0]))
    found, content = os.stat(sample.shard), bytearray(Path(sample.shard).read_bytes())
    content[sample.image[0] + sample.image[1] // 2] ^= 1
    Path(sample.shard).write_bytes(content)
    os.utime(sample.shard, ns=(found.st_atime_ns, found.st_mtime_ns))
    command = [sys.executable, "-m", "amclip_ds", *last_of_each(["train", "aclip-tiny", *words, "--procs", "2"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 3, done.stderr
    verdict = json.loads((run / "exit.json").read_text())
    assert verdict["code"] == 3 and "is not what was indexed: the shard changed since" in verdict["reason"]
    assert "rank 1 failed first" in done.stderr and verdict["reason"] in done.stderr


def test_another_word_table_is_refused(scenes: Path, tmp_path: Path) -> None:
    """By what it holds: the same one may be anywhere."""
    made = {"format": 1, "tokenizer": tokenizer_hash(), "samples": 9, "counts": {"a": 50, "red": 40}}
    for name, counts in (("one", {}), ("moved", {}), ("other", {"red": 41})):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({**made, "counts": {**made["counts"], **counts}}))
    keys = [f"data.train={scenes}", *SMALL, f"run.out={tmp_path}/run", "data.text_mask.strategy=frequency"]
    keys += ["data.text_mask.tokens=4", "checkpoint.every_steps=1", "checkpoint.allow_drift=[run.steps]"]
    code, printed = amclip(*keys, f"data.text_mask.table={tmp_path}/one.json", "run.steps=1")
    assert code == 0, printed
    code, printed = amclip(*keys, f"data.text_mask.table={tmp_path}/other.json", "run.steps=2")
    assert code == 2 and "data.text_mask.table: content " in printed, printed
    code, printed = amclip(*keys, f"data.text_mask.table={tmp_path}/moved.json", "run.steps=2")
    assert code == 0 and "resumes from" in printed, printed


def test_a_run_that_continues_has_the_weights_of_its_newest_checkpoint(few_scenes: Path, tmp_path: Path) -> None:
    """Not those of its former end, nor of the run before it: eval, export and distill.teacher took them for it."""
    run = tmp_path / "run"
    keys = [f"data.train={few_scenes}", *SMALL, f"run.out={run}"]
    assert amclip(*keys, "run.steps=2")[0] == 0
    assert (locate(run).kind, locate(run).step) == ("run", 2)
    assert amclip(*keys, "run.steps=2")[0] == 0, "it has ended: they stay"
    assert not list(run.glob("superseded-*"))
    for more, step in ((["checkpoint.allow_drift=[run.steps]"], 3), (["--resume", "never"], 1)):
        (run / "STOP").touch()
        printed = amclip(*keys, "run.steps=4", *more)[1]
        verdict = json.loads((run / "exit.json").read_text())
        assert (verdict["code"], verdict["step"]) == (75, step), printed
        assert (locate(run).kind, locate(run).step) == ("checkpoint", step)
    names = sorted(path.name for path in run.glob("superseded-*"))
    assert names == ["superseded-student.safetensors-0", "superseded-teacher.safetensors-0"], "not deleted"


def test_another_frozen_teacher_at_the_same_path_is_refused(scenes: Path, tmp_path: Path) -> None:
    common = [f"data.train={scenes}", *SMALL, "checkpoint.every_steps=1"]
    for name, seed in (("one", 0), ("other", 1)):
        code, printed = amclip(*common, f"run.out={tmp_path}/{name}", f"run.seed={seed}", "run.steps=1")
        assert code == 0, printed
    (tmp_path / "teacher").symlink_to("one")
    keys = ["loss.clipkd.weight=1", *common, f"distill.teacher={tmp_path}/teacher", f"run.out={tmp_path}/run"]
    keys += ["checkpoint.allow_drift=[run.steps]"]
    code, printed = amclip(*keys, "run.steps=1")
    assert code == 0, printed
    (tmp_path / "teacher").unlink()
    (tmp_path / "teacher").symlink_to("other")
    code, printed = amclip(*keys, "run.steps=2")
    assert code == 2 and "distill.teacher: content " in printed, printed
    (tmp_path / "teacher").unlink()
    (tmp_path / "one").rename(tmp_path / "teacher")
    code, printed = amclip(*keys, "run.steps=2")
    assert code == 0 and "resumes from" in printed, printed


def test_drift_damage_and_fresh_starts(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    keys = [f"data.train={scenes}", "run.steps=4", "checkpoint.every_steps=2", *SMALL, f"run.out={run}"]
    assert amclip(*keys)[0] == 0
    (run / "checkpoints" / step_folders.folder_name(4)).rename(tmp_path / "kept")
    (run / "checkpoints" / "latest").write_text(step_folders.folder_name(2))

    code, printed = amclip(*keys, "optim.lr=0.5")
    assert code == 2 and "optim.lr: 0.0015 -> 0.5" in printed and "allow_drift=[optim.lr]" in printed, printed
    assert "lr: 0.0015" in (run / "config.yaml").read_text(), "what was refused leaves no trace"
    code, printed = amclip(*keys, "optim.lr=0.5", "checkpoint.allow_drift=[optim.lr]")
    assert code == 0, printed
    assert "lr: 0.5" in (run / "config.yaml").read_text()
    assert [row["key"] for row in read_lines(run / "incidents.jsonl") if row["kind"] == "drift"] == ["optim.lr"]
    newest = run / "checkpoints" / step_folders.folder_name(4)
    assert manifest.verify(newest).drift == ["step 2: optim.lr: 0.0015 -> 0.5"], "recorded in what comes after"
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4], "no step is there twice"
    assert [row["step"] for row in read_lines(run / "metrics.superseded.jsonl")] == [3, 4]

    shutil.rmtree(newest)
    shutil.copytree(tmp_path / "kept", newest)
    flip(newest / "optim/rank0000.safetensors")
    code, printed = amclip(*keys)
    assert code == 2 and "optim/rank0000.safetensors" in printed and "checkpoint.fallback=true" in printed, printed
    code, printed = amclip(*keys, "checkpoint.fallback=true")
    assert code == 0 and "resumes from" in printed, printed
    kinds = [row["kind"] for row in read_lines(run / "incidents.jsonl")]
    assert "checkpoint_fallback" in kinds
    assert manifest.verify(newest).step == 4, "written anew"
    assert list((run / "checkpoints").glob("superseded-step_00000004-*")), "the damaged one was set aside, not deleted"

    code, printed = amclip(*keys, "--resume", "never")
    assert code == 0 and "resumes from" not in printed, printed
    assert json.loads((run / "exit.json").read_text())["attempt"] == 5
