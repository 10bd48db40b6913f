"""Saving on one rank: what is in a folder, what is kept, what a failure leaves, when a save is due."""

import collections
import contextlib
import errno
import hashlib
import json
import mmap
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from amclip_ds.checkpoint import CheckpointConfig, background, load, manifest, retention, save, step_folders
from amclip_ds.checkpoint.ranks import Ranks
from amclip_ds.checkpoint.save import SaveFailed, Saver
from amclip_ds.errors import AmclipError, UserError
from tests.distributed.cases_checkpoint_files import SIZES, holds_step, toy_counters, toy_state, value


class Recorder:
    """A saver's lines and incidents."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.incidents: list[tuple[str, str, str]] = []

    def saver(self, folder: Path, **settings: Any) -> Saver:
        config = CheckpointConfig(**{"every_steps": None, "every_minutes": None} | settings)
        return Saver(folder, config, Ranks(), say=self.lines.append, incident=lambda *what: self.incidents.append(what))


def save_steps(folder: Path, *steps: int, **settings: Any) -> Recorder:
    reported = Recorder()
    with reported.saver(folder, **settings) as saver:
        for step in steps:
            saver.save(step, toy_state(step, 0, 1), wait=True)
    return reported


def steps_in(folder: Path) -> list[int]:
    return [step for step, _ in step_folders.list_steps(folder)]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_another_program_can_read_a_checkpoint(asynchronous: bool, tmp_path: Path) -> None:
    """By docs/checkpoint-format.md alone: json, sha256 and the safetensors library."""
    save_steps(tmp_path, 5, asynchronous=asynchronous)
    folder = tmp_path / "step_00000005"
    assert (tmp_path / "latest").read_text() == "step_00000005\n"
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    held = json.loads((folder / "manifest.json").read_text())
    assert written == {*held["files"], "manifest.json"}
    for name, numel in SIZES.items():
        tensors = load_file(folder / "model/rank0000.safetensors")
        assert torch.equal(tensors[f"master|{name}|0|{numel}"], value(5, "master", name))
    assert load_file(folder / "replicated.safetensors")["buffer"].tolist() == [5.0] * 3
    assert json.loads((folder / "trainer.json").read_text()) == toy_counters(5)
    assert manifest.verify(folder).step == 5


def test_a_load_writes_into_the_state(tmp_path: Path) -> None:
    save_steps(tmp_path, 5)
    found = load.find(tmp_path, "auto", False, Ranks())
    assert found is not None
    for rank in range(3):
        state = toy_state(0, rank, 3)
        load.fill(found, state, Ranks())
        assert holds_step(state, 5) and not holds_step(state, 4)


def test_state_of_another_model_is_refused_untouched(tmp_path: Path) -> None:
    save_steps(tmp_path, 5)
    found = load.find(tmp_path, "auto", False, Ranks())
    assert found is not None
    state = toy_state(0, 0, 1)
    state.shapes["seven"] = [8]
    with pytest.raises(UserError, match=r"of another model: seven \[7\] -> \[8\]"):
        load.fill(found, state, Ranks())
    other = toy_state(0, 0, 1)
    other.sharded["momentum_buffer"] = other.sharded.pop("exp_avg")
    with pytest.raises(UserError, match="of another optimizer: its exp_avg has no place here"):
        load.fill(found, other, Ranks())
    other.sharded["exp_avg"] = other.sharded.pop("momentum_buffer")
    assert holds_step(state, 0) and holds_step(other, 0), "neither was touched"


def test_the_newest_the_rounded_and_the_pinned_stay(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    (tmp_path / "step_00000001" / "pinned").touch()
    save_steps(tmp_path, 3, 4, 5, 6, 7, keep_last=2, keep_every_steps=4)
    assert steps_in(tmp_path) == [1, 4, 6, 7]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, keep_last=3)
    (tmp_path / "step_00000003" / "manifest.json").unlink()
    save_steps(tmp_path, 4, keep_last=2)
    assert steps_in(tmp_path) == [2, 3, 4], "3 is damaged: 2 and 4 are the last two"


def test_a_commit_looks_at_the_files_of_no_checkpoint_that_stays_anyway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many kept ones of many ranks would be thousands of stats, at each commit, for which all ranks wait."""
    save_steps(tmp_path, *range(1, 21), keep_last=20)
    (tmp_path / "step_00000007" / "pinned").touch()
    looked_at: list[str] = []
    lstat = os.lstat

    def counted(path: Any, **options: Any) -> os.stat_result:
        if (step := Path(str(path)).relative_to(tmp_path).parts[:1]) and Path(str(path)).suffix == ".safetensors":
            looked_at.append(step[0])
        return lstat(path, **options)

    monkeypatch.setattr(manifest.os, "lstat", counted)  # type: ignore[attr-defined]
    config = CheckpointConfig(keep_last=2, keep_every_steps=2)
    found = [step for step, _ in retention.expired(tmp_path, config)]
    assert found == [1, 3, 5, 9, 11, 13, 15, 17], "19 and 20 are the newest, 7 is pinned, even ones stay"
    assert {int(name.removeprefix("step_")) for name in looked_at} == {*found, 19, 20}
    num_files = len([path for path in (tmp_path / "step_00000020").rglob("*.safetensors")])
    assert len(looked_at) == num_files * (len(found) + 2)
    looked_at.clear()
    assert not retention.expired(tmp_path, CheckpointConfig(keep_last=2, keep_every_steps=1))
    assert set(looked_at) == {"step_00000019", "step_00000020"}


def test_training_waits_only_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An asynchronous save returns while its writer cannot have ended; at most one is in flight."""
    reported = Recorder()
    with reported.saver(tmp_path, asynchronous=True) as saver:
        saver.save(1, toy_state(1, 0, 1), wait=True)
        assert saver._writer is not None
        os.kill(saver._writer._process.pid, signal.SIGSTOP)
        state = toy_state(2, 0, 1)
        saver.save(2, state)
        for held in state.sharded.values():  # training continues, over the same memory
            for shard in held.values():
                shard.tensor.fill_(-1.0)
        assert steps_in(tmp_path) == [1] and saver.newest == 1
        saver.after_step(3, False, lambda: toy_state(3, 0, 1))
        assert steps_in(tmp_path) == [1], "not done: the step does not wait for it"
        os.kill(saver._writer._process.pid, signal.SIGCONT)
        saver.save(4, toy_state(4, 0, 1))
        assert saver.newest == 2, "the one in flight was ended first"
    assert steps_in(tmp_path) == [2, 4]
    found = load.find(tmp_path, str(tmp_path / "step_00000002"), False, Ranks())
    assert found is not None
    state = toy_state(0, 0, 1)
    load.fill(found, state, Ranks())
    assert holds_step(state, 2), "what was copied, not what came after"


def test_signals_that_stop_a_run_do_not_stop_its_writer(tmp_path: Path) -> None:
    """Not even one that comes while the writer starts."""
    reported = Recorder()
    with reported.saver(tmp_path, asynchronous=True) as saver:
        saver.save(1, toy_state(1, 0, 1))
        assert saver._writer is not None
        for _ in range(20):
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                os.kill(saver._writer._process.pid, number)
            time.sleep(0.01)
        saver.finish()
    assert steps_in(tmp_path) == [1]


def test_a_writer_that_dies_is_loud_and_replaced(tmp_path: Path) -> None:
    reported = Recorder()
    with reported.saver(tmp_path, asynchronous=True, every_steps=1) as saver:
        saver.save(1, toy_state(1, 0, 1), wait=True)
        assert saver._writer is not None
        os.kill(saver._writer._process.pid, signal.SIGSTOP)
        saver.save(2, toy_state(2, 0, 1))
        os.kill(saver._writer._process.pid, signal.SIGKILL)
        saver._writer._process.wait()
        saver.after_step(3, False, lambda: toy_state(3, 0, 1))
    assert [kind for kind, *_ in reported.incidents] == ["checkpoint_failed"]
    assert "ended by itself" in reported.incidents[0][1] and any("checkpoint failed" in line for line in reported.lines)
    assert steps_in(tmp_path) == [1, 3]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_save_that_takes_too_long_has_failed(tmp_path: Path) -> None:
    reported = Recorder()
    with reported.saver(tmp_path, asynchronous=True) as saver:
        saver.save(1, toy_state(1, 0, 1), wait=True)
        assert saver._writer is not None
        os.kill(saver._writer._process.pid, signal.SIGSTOP)
        usual, saver.config = saver.config, replace(saver.config, timeout_s=1.0)
        with pytest.raises(SaveFailed, match="checkpoint.timeout_s"):
            saver.save(2, toy_state(2, 0, 1), wait=True)
        saver.config = usual
        saver.save(3, toy_state(3, 0, 1), wait=True)
    assert steps_in(tmp_path) == [1, 3]


def test_the_last_save_raises_and_the_others_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported = Recorder()
    with reported.saver(tmp_path, asynchronous=False, every_steps=1) as saver:
        monkeypatch.setattr(save, "_free_space", lambda path: 1000)
        saver.after_step(1, False, lambda: toy_state(1, 0, 1))
        assert len(reported.incidents) == 1 and "rank 0 sees 1 kB free" in reported.incidents[0][1]
        with pytest.raises(SaveFailed, match="needs"):
            saver.after_step(2, True, lambda: toy_state(2, 0, 1))
    assert steps_in(tmp_path) == []


def test_saves_come_by_steps_by_the_clock_and_at_the_end(tmp_path: Path) -> None:
    def run(folder: Path, seconds: float, **settings: Any) -> list[int]:
        with Recorder().saver(folder, asynchronous=False, keep_last=100, **settings) as saver:
            for step in range(1, 8):
                time.sleep(seconds)
                saver.after_step(step, step == 7, lambda step=step: toy_state(step, 0, 1))  # type: ignore[misc]
        return steps_in(folder)

    assert run(tmp_path / "steps", 0.0, every_steps=3) == [3, 6, 7]
    assert run(tmp_path / "end", 0.0) == [7]
    start = time.monotonic()
    by_clock = run(tmp_path / "clock", 0.1, every_minutes=0.25 / 60)
    at_most = (time.monotonic() - start) / 0.25 + 1  # a loaded machine takes longer, and the last step saves too
    assert by_clock[-1] == 7 and 2 <= len(by_clock) <= at_most, by_clock


def test_the_end_of_a_background_save_is_no_other_save(tmp_path: Path) -> None:
    """The report lists a checkpoint a save: one that an earlier step began ends as its commit."""
    waits: list[tuple[str, int]] = []
    step = 0

    @contextlib.contextmanager
    def pausing(event: str) -> Iterator[None]:
        waits.append((event, step))
        yield

    config = CheckpointConfig(every_steps=5, every_minutes=None, asynchronous=True)
    with Saver(tmp_path, config, Ranks(), say=lambda text: None, pausing=pausing) as saver:
        for step in range(1, 9):
            saver.after_step(step, False, lambda: toy_state(5, 0, 1))
            time.sleep(0.01 if step < 5 else 0.5)
        step = 10
        saver.after_step(step, False, lambda: toy_state(10, 0, 1))
        saver.settle()
    assert [event for event, _ in waits] == ["save", "commit", "save", "commit"] and steps_in(tmp_path) == [5, 10]
    assert waits[0] == ("save", 5) and 5 < waits[1][1] < 10 and waits[2] == ("save", 10)


def test_a_lost_folder_is_not_committed_to(tmp_path: Path) -> None:
    class NotOurs(AmclipError):
        exit_code = 3

    def check() -> None:
        raise NotOurs("another trainer has it")

    saver = Saver(tmp_path, CheckpointConfig(), Ranks(), before_commit=check, say=lambda text: None)
    with pytest.raises(NotOurs), saver:
        saver.save(1, toy_state(1, 0, 1), wait=True)
    assert list(tmp_path.iterdir()) == []


def test_a_host_without_memory_for_a_snapshot_saves_synchronously(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "available_memory", lambda: 1000)
    reported = save_steps(tmp_path, 1, asynchronous=True)
    assert steps_in(tmp_path) == [1] and any("waits for the disk" in line for line in reported.lines)


def made_host(root: Path, cgroup: str, folders: dict[str, dict[str, str]]) -> Path:
    """A /proc and /sys with 1000 GiB left on the host; cgroup's folder -> its files."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal: {2000 << 20} kB\nMemAvailable:   {1000 << 20} kB\n")
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    for folder, files in folders.items():
        (root / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (root / "sys/fs/cgroup" / folder / name).write_text(content)
    return root


def v2(limit: str, used: int, cache: int = 0) -> dict[str, str]:
    stat = f"anon 5\nfile {9 << 30}\ninactive_file {cache << 30}\nactive_file 7\n"
    return {"memory.max": f"{limit}\n", "memory.current": f"{used << 30}\n", "memory.stat": stat}


def v1(limit: int, used: int, cache: int) -> dict[str, str]:
    stat = f"inactive_file 3\ntotal_inactive_file {cache << 30}\n"
    sizes = {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{used << 30}\n"}
    return sizes | {"memory.stat": stat}


SLURM = "system.slice/slurmstepd.scope/job_7"
HYBRID = "4:memory:/slurm/job_7/step_0\n1:cpu,cpuacct:/slurm\n0::/init.scope\n"


@pytest.mark.parametrize(
    "cgroup, folders, gib",
    [
        ("0::/user.slice\n", {"user.slice": v2("max", 50)}, 1000),
        (f"0::/{SLURM}/step_0\n", {SLURM: v2(str(64 << 30), 40), f"{SLURM}/step_0": v2("max", 40)}, 24),
        (f"0::/{SLURM}\n", {SLURM: v2(str(64 << 30), 60, cache=30)}, 34),
        (f"0::/{SLURM}\n", {SLURM: v2(str(64 << 30), 65)}, 0),
        ("0::/on/the/host/only\n", {"": v2(str(8 << 30), 2)}, 6),
        (f"0::/{SLURM}\n", {SLURM: {"memory.max": "64\n"}}, 1000),
        (HYBRID, {"memory/slurm/job_7": v1(64 << 30, 50, 10), "memory": v1((1 << 63) - 4096, 500, 0)}, 24),
        ("12:cpu,memory:/job\n", {"memory/job": v1(16 << 30, 4, 0)}, 12),
        ("nonsense\n", {}, 1000),
    ],
)
def test_the_jobs_memory_limit_is_the_hosts(cgroup: str, folders: dict, gib: int, tmp_path: Path) -> None:
    """The least of the host and every cgroup above the process, v2 and v1; cache that is given back is no use of it."""
    assert background.available_memory(made_host(tmp_path, cgroup, folders)) == gib << 30


def test_a_host_that_says_nothing_of_its_memory(tmp_path: Path) -> None:
    assert background.available_memory(tmp_path) == 1 << 62 and 0 <= background.available_memory() < 1 << 50


@pytest.mark.parametrize("failure", [OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError()])
def test_a_snapshot_that_fails_once_costs_this_save_a_wait(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures, mapped = [failure], mmap.mmap

    def at_first_none(*words: Any) -> mmap.mmap:
        if failures:
            raise failures.pop()
        return mapped(*words)

    monkeypatch.setattr(mmap, "mmap", at_first_none)
    reported = Recorder()
    with reported.saver(tmp_path, asynchronous=True) as saver:
        for step in (1, 2):
            saver.save(step, toy_state(step, 0, 1), wait=True)
            assert (saver._writer is None) == (step == 1)
    assert steps_in(tmp_path) == [1, 2] and [kind for kind, *_ in reported.incidents] == ["no_snapshot"]
    assert sum("rank 0 gets no snapshot: " in line for line in reported.lines) == 1


def test_a_save_of_a_committed_step_leaves_it(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    before = (tmp_path / "step_00000001").stat().st_mtime_ns
    save_steps(tmp_path, 1)
    assert (tmp_path / "step_00000001").stat().st_mtime_ns == before


def test_a_start_removes_what_a_kill_left(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    for name in (".tmp-step_00000002", ".del-step_00000000-0"):
        (tmp_path / name / "model").mkdir(parents=True)
    Recorder().saver(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_what_will_be_written_again_is_set_aside_not_deleted(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, keep_last=9)
    moved = retention.supersede(tmp_path, tmp_path / "step_00000001", 1)
    assert steps_in(tmp_path) == [1] and (tmp_path / "latest").read_text() == "step_00000001\n"
    assert [manifest.read(path).step for path in moved] == [2, 3]
    retention.supersede(tmp_path, None, 0)
    assert steps_in(tmp_path) == [] and not (tmp_path / "latest").exists()


def test_which_checkpoint_a_resume_means(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    assert load.find(folder, "auto", False, Ranks()) is None
    with pytest.raises(UserError, match="there is no checkpoint"):
        load.find(folder, str(tmp_path / "nowhere"), False, Ranks())
    save_steps(folder, 1, 2)
    for resume, step in (("auto", 2), (str(tmp_path / "run"), 2), (str(folder), 2), (str(folder / "step_00000001"), 1)):
        found = load.find(folder, resume, False, Ranks())
        assert found is not None and found.manifest.step == step
    assert load.find(folder, "never", False, Ranks()) is None
    (folder / "latest").unlink()
    for path in (folder / "step_00000001", folder / "step_00000002"):
        (path / "trainer.json").unlink()
    with pytest.raises(UserError, match="trainer.json"):
        load.find(folder, "auto", False, Ranks())
    with pytest.raises(UserError, match="every checkpoint is damaged"):  # never a silent fresh start
        load.find(folder, "auto", True, Ranks())


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_whose_folder_was_renamed_continues_and_says_where(asynchronous: bool, tmp_path: Path) -> None:
    run, reported = tmp_path / "run", Recorder()
    with reported.saver(run / "checkpoints", asynchronous=asynchronous) as saver:
        saver.save(1, toy_state(1, 0, 1), wait=True)
        run.rename(tmp_path / "moved")
        saver.save(2, toy_state(2, 0, 1), wait=True)
    assert steps_in(tmp_path / "moved" / "checkpoints") == [1] and steps_in(run / "checkpoints") == [2]
    assert manifest.verify(run / "checkpoints" / "step_00000002").step == 2
    [(kind, cause, _)] = reported.incidents
    assert kind == "folder_gone" and f"{run} is gone" in cause and "step_00000001" in cause


def test_the_manifest_of_1024_ranks_is_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the check that its 4,099 files are there one look a file, not three."""
    facts = {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    names = [f"{kind}/rank{rank:04d}.safetensors" for rank in range(1024) for kind in ("model", "optim", "ema")]
    names += [f"rng/rank{rank:04d}.json" for rank in range(1024)]
    names += ["replicated.safetensors", "trainer.json", "config.yaml"]
    folder = tmp_path / "step_00000007"
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"abc")
    shapes = {f"vision.blocks.{number}.weight": [4, 4] for number in range(365)}
    tensors = {kind: dict.fromkeys(shapes, 16) for kind in ("master", "exp_avg", "exp_avg_sq", "ema")}
    described = manifest.Manifest(7, 1024, 3, "bfloat16", dict.fromkeys(names, facts), tensors, shapes, time=1.0)
    (folder / manifest.NAME).write_bytes(manifest.dump(described))
    calls = collections.Counter[str]()
    for name in ("open", "lstat"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _f=function, _n=name, **k: (calls.update([_n]), _f(*a, **k))[1])
    started = time.process_time()
    found = manifest.read(folder)
    assert calls["open"] <= 1 and time.process_time() - started < 1.0
    calls.clear()
    manifest.check_sizes(folder, found)
    assert calls["lstat"] == len(names) + 5 and not calls["open"]
