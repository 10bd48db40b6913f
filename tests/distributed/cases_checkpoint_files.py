"""What the tests of kills, full disks and damage run: a toy state on real gloo ranks, saved by the real saver.

The kill trials run inside one process that has torch already; it forks two ranks a trial and kills them.
"""

import contextlib
import ctypes
import hashlib
import os
import random
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from amclip_ds.checkpoint import CheckpointConfig, failpoints, load, manifest, step_folders
from amclip_ds.checkpoint.ranks import Ranks
from amclip_ds.checkpoint.save import Saver
from amclip_ds.checkpoint.state import CheckpointState
from amclip_ds.checkpoint.tensorfile import DamagedError
from amclip_ds.engine.shards import Shard
from amclip_ds.errors import AmclipError, LocalRunStopped
from amclip_ds.ranks.launcher_env import free_port

SIZES = {"one": 1, "seven": 7, "some": 1000, "many": 150_001}
KINDS = ("master", "exp_avg", "ema")
RANKS = 2
OF_RANK_0 = {"manifest_written", "before_rename", "after_rename", "latest_written", "purge_renamed", "purge_middle"}
CLONE_NEWNS, MS_RDONLY, MS_REMOUNT, MS_PRIVATE, MS_REC = 0x20000, 1, 32, 1 << 18, 1 << 14


def value(step: int, kind: str, name: str) -> torch.Tensor:
    """What every element must be at a step."""
    return torch.arange(SIZES[name]) * 1e-3 + step + 1000 * KINDS.index(kind)


def toy_counters(step: int) -> dict[str, Any]:
    """trainer.json of a run that skipped nothing."""
    guards = {"window": [0.5], "skipped_in_a_row": 0, "skipped": 0, "rewinds": 0}
    run = {"step": step, "updates": step, "samples_seen": 8 * step, "epoch": 0, "guards": guards}
    return {"run": run | {"cursor": {"epoch": 0, "step": step}}, "optimizer": {"step": float(step)}}


def toy_state(step: int, rank: int, world_size: int) -> CheckpointState:
    """Parameters cut over the ranks as ZeRO cuts them: some ranks hold nothing of a small one."""
    sharded: dict[str, dict[str, Shard]] = {}
    for kind in KINDS:
        for name, numel in SIZES.items():
            length = -(-numel // world_size)
            start = min(numel, rank * length)
            part = value(step, kind, name)[start : start + length].clone()
            if part.numel():
                sharded.setdefault(kind, {})[name] = Shard(part, start, part.numel(), numel)
    return CheckpointState(
        sharded=sharded,
        shapes={name: [numel] for name, numel in SIZES.items()},
        replicated={"buffer": torch.full((3,), float(step))},
        small=toy_counters(step),
        stage=2,
        config="a: 1\n",
    )


def holds_step(state: CheckpointState, step: int) -> bool:
    """Whether every element is what it must be."""
    wanted = toy_state(step, 0, 1).sharded
    parts = [
        torch.equal(shard.tensor, wanted[kind][name].tensor[shard.start : shard.start + shard.length])
        for kind, held in state.sharded.items()
        for name, shard in held.items()
    ]
    return all(parts) and torch.equal(state.replicated["buffer"], torch.full((3,), float(step)))


def join(rank: int, world_size: int, port: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )


def join_from_environment() -> None:
    join(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["MASTER_PORT"]))


# ------------------------------------------------------------------ kills


def kill_trials(folder: str, trials: int, seed: int, style: str) -> dict[str, Any]:
    """Kills `trials` pairs of ranks that save without end. Returns counts and every violation found.

    style: ours, or latest_first (a shard each, `latest` written by rank 0 as soon as its own shard is).
    """
    dice = random.Random(seed)
    root, result = Path(folder), {"kills": 0, "lost": 0, "backwards": 0, "committed": 0, "phases": {}, "trouble": []}
    newest = 0
    for trial in range(trials):
        phase = None if trial % 3 == 2 else failpoints.PHASES[(trial - trial // 3) % len(failpoints.PHASES)]
        victim = 0 if phase in OF_RANK_0 and style == "ours" else dice.randrange(RANKS)
        plan = {
            "phase": phase,
            "victim": victim,
            "all": dice.random() < 0.5,
            "after": dice.randint(1, 3),
            "delay": dice.uniform(0.0, 0.25),
            "asynchronous": style == "ours" and dice.random() < 0.5,
        }
        acknowledged = _one_trial(root, style, plan)
        result["kills"] += 1
        result["phases"][phase or "random"] = result["phases"].get(phase or "random", 0) + 1
        result["committed"] += len(acknowledged)
        reported = max([newest, *acknowledged])
        found, trouble = (_newest_of_ours if style == "ours" else _latest)(root)
        if trouble or found < reported:
            result["lost"] += 1
            result["trouble"].append(f"trial {trial} {plan}: newest {found}, reported {reported}; {trouble}")
        result["backwards"] += int(found < newest)
        newest = max(newest, found)
        if style != "ours" and (trouble or found < reported):
            shutil.rmtree(root, ignore_errors=True)  # nothing to resume from: the next trial starts afresh
            newest = 0
    return result


def _one_trial(root: Path, style: str, plan: dict[str, Any]) -> list[int]:
    """Forks the ranks, kills them as planned. Returns the steps that rank 0 reported as committed."""
    port, (reader, writer) = free_port(), os.pipe()
    pids = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                os.setpgid(0, 0)
                os.close(reader)
                (_save_for_ever if style == "ours" else _save_latest_first)(root, rank, port, plan, writer)
            os._exit(1)
        pids.append(pid)
    os.close(writer)
    acknowledged = _await(reader, 1 + plan["after"], pids)
    if plan["phase"] is None:
        time.sleep(plan["delay"])
        for rank in range(RANKS) if plan["all"] else [plan["victim"]]:
            os.kill(pids[rank], signal.SIGKILL)
    deadline = time.monotonic() + 20
    while not any(_has_ended(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.002)
    # What the others do before the launcher ends them; the order that loses needs time to write and name `latest`.
    time.sleep(0.0 if plan["all"] else 0.05 if style == "ours" else 0.5)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    acknowledged += _drain(reader)
    os.close(reader)
    return acknowledged


def _has_ended(pid: int) -> bool:
    info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return info is not None


def _await(reader: int, count: int, pids: list[int]) -> list[int]:
    """The first `count` steps reported, fewer if a rank ends before."""
    os.set_blocking(reader, False)
    reported: list[int] = []
    deadline = time.monotonic() + 60
    while len(reported) < count and time.monotonic() < deadline and not any(_has_ended(pid) for pid in pids):
        reported += _drain(reader)
        time.sleep(0.002)
    return reported


def _drain(reader: int) -> list[int]:
    content = b""
    with contextlib.suppress(BlockingIOError):
        while part := os.read(reader, 65536):
            content += part
    return [int.from_bytes(content[i : i + 8], "little") for i in range(0, len(content) - 7, 8)]


def _save_for_ever(root: Path, rank: int, port: int, plan: dict[str, Any], writer: int) -> None:
    join(rank, RANKS, port)
    ranks = Ranks(timeout_s=30)
    found = load.find(root, "auto", False, ranks)
    step = found.manifest.step if found else 0
    if found:
        state = toy_state(0, rank, RANKS)
        load.fill(found, state, ranks)
        assert holds_step(state, step)
    config = CheckpointConfig(keep_last=2, asynchronous=plan["asynchronous"], timeout_s=30)
    with Saver(root, config, ranks, say=lambda text: None) as saver:
        for count in range(10_000):
            if count == plan["after"] and plan["phase"] and (rank == plan["victim"] or plan["all"]):
                failpoints.ARMED.add(plan["phase"])
            step += 1
            saver.save(step, toy_state(step, rank, RANKS))
            if rank == 0 and saver.newest:
                os.write(writer, saver.newest.to_bytes(8, "little"))


def _newest_of_ours(root: Path) -> tuple[int, str]:
    """The newest committed step; what is wrong with any committed one."""
    trouble = []
    steps = step_folders.list_steps(root)
    for step, path in steps:
        try:
            manifest.verify(path)
            found = load.verified(path, Ranks())
            state = toy_state(0, 0, 1)
            load.fill(found, state, Ranks())
            if not holds_step(state, step):
                trouble.append(f"{path} holds other values")
        except (DamagedError, AmclipError) as error:
            trouble.append(str(error))
    return (steps[-1][0] if steps else 0), "; ".join(trouble)


def _save_latest_first(root: Path, rank: int, port: int, plan: dict[str, Any], writer: int) -> None:
    """The order of DeepSpeed's save_checkpoint, as measured: rank 0 writes `latest` while others may still write."""
    join(rank, RANKS, port)
    _, step_text = (root / "latest").read_text().split("_") if (root / "latest").exists() else ("", "0")
    step = int(step_text)
    for count in range(10_000):
        step += 1
        state = toy_state(step, rank, RANKS)
        folder = root / f"step_{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        content = b"".join(bytes(s.tensor.numpy().tobytes()) for held in state.sharded.values() for s in held.values())
        dist.barrier()
        armed = count == plan["after"] and plan["phase"] is not None and (rank == plan["victim"] or plan["all"])
        with (folder / f"rank{rank}.bin").open("wb") as file:
            file.write(hashlib.sha256(content).digest())
            for start in range(0, len(content), 1 << 16):
                file.write(content[start : start + (1 << 16)])
                if armed and plan["phase"].startswith(("write", "snapshot", "make", "gathered")):
                    os.kill(os.getpid(), signal.SIGKILL)
            file.flush()
            os.fsync(file.fileno())
        if rank == 0:
            (root / "latest").write_text(f"step_{step:08d}")
            os.write(writer, step.to_bytes(8, "little"))
            if armed:
                os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()
        if armed:
            os.kill(os.getpid(), signal.SIGKILL)


def _latest(root: Path) -> tuple[int, str]:
    """The step that `latest` names; what is wrong with it."""
    text = (root / "latest").read_text() if (root / "latest").exists() else ""
    if not text:
        return 0, "latest is empty" if (root / "latest").exists() else ""
    for rank in range(RANKS):
        file = root / text / f"rank{rank}.bin"
        content = file.read_bytes() if file.exists() else b""
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            return int(text.split("_")[1]), f"{file} is not whole"
    return int(text.split("_")[1]), ""


# ------------------------------------------------------------------ full and vanishing disks


def _mount(kind: str, target: Path, options: str, flags: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", str(target).encode(), kind.encode(), flags, options.encode()):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), str(target))


def own_mounts() -> None:
    """From here on this process's mounts are its own, and go with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "unshare")
    _mount("", Path("/"), "", MS_REC | MS_PRIVATE)


def can_mount() -> str | None:
    """Why this machine cannot mount a tmpfs; None if it can. Forks, since it changes the process."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            own_mounts()
            _mount("tmpfs", Path("/mnt"), "size=64k")
            code = 0
        os._exit(code)
    return (
        None if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 else "a tmpfs cannot be mounted here (not root?)"
    )


def disk_case(folder: str, what: str, asynchronous: bool) -> dict[str, Any]:
    """Saves step 1; then trouble; tries step 2; fixes it; saves step 3. Returns errors, seconds, what is left.

    what: one_full (rank 1 alone runs out while it writes) | all_full (the same, every rank) | too_small (seen before
    writing) | read_only | vanished.
    """
    own_mounts()
    join_from_environment()
    ranks, root = Ranks(timeout_s=20), Path(folder)
    rank = ranks.rank
    config = CheckpointConfig(asynchronous=asynchronous, timeout_s=20, keep_last=10)
    with Saver(root, config, ranks, say=lambda text: None) as saver:
        saver.save(1, toy_state(1, rank, RANKS), wait=True)
        before = _listing(root)
        made: list[Path] = []

        def fill_up() -> None:
            """Called once the folder is made: from now on there is hardly room in it."""
            shard_folder = root / f".tmp-{step_folders.folder_name(2)}" / "model"
            if what == "all_full" or (what == "one_full" and rank == 1):
                _mount("tmpfs", shard_folder, "size=64k")
                made.append(shard_folder)
            if what == "vanished" and rank == 0:
                root.rename(root.parent / "moved")

        mounted = _trouble(root, what)
        failpoints.INSTEAD["make_folder"] = fill_up
        began, error = time.monotonic(), ""
        try:
            saver.save(2, toy_state(2, rank, RANKS), wait=True)
        except AmclipError as failure:
            error = f"{type(failure).__name__}: {failure}"
        seconds = time.monotonic() - began
        failpoints.INSTEAD.clear()
        for target in [*made, *mounted]:
            _unmount(target)
        if what == "vanished" and rank == 0:
            (root.parent / "moved").rename(root)
        dist.barrier()
        for target in made:
            shutil.rmtree(target.parent, ignore_errors=True)
        dist.barrier()
        between = _listing(root)
        saver.save(3, toy_state(3, rank, RANKS), wait=True)
    found = load.find(root, "auto", False, ranks)
    assert found is not None
    state = toy_state(0, rank, RANKS)
    load.fill(found, state, ranks)
    return {
        "error": error,
        "seconds": seconds,
        "untouched": before == between,
        "after": found.manifest.step,
        "right": holds_step(state, 3),
        "left": sorted(p.name for p in root.iterdir() if p.name.startswith(".")),
    }


def _trouble(root: Path, what: str) -> list[Path]:
    dist.barrier()
    if what == "too_small":  # the same small file system for every rank: a view of its own, mounted over the folder
        _mount("tmpfs", root, "size=512k")
    if what == "read_only":
        _mount("tmpfs", root, "size=16m")
        _mount("tmpfs", root, "size=16m", MS_REMOUNT | MS_RDONLY)
    dist.barrier()
    return [root] if what in ("too_small", "read_only") else []


def _unmount(target: Path) -> None:
    dist_free = ctypes.CDLL(None, use_errno=True)
    dist_free.umount2(str(target).encode(), 2)  # MNT_DETACH


def _listing(root: Path) -> dict[str, str]:
    """Every committed file with its hash."""
    files = [
        path for _, folder in step_folders.list_steps(root) for path in sorted(folder.rglob("*")) if path.is_file()
    ]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def alone_case(folder: str) -> float:
    """Rank 1 meets an error of its own while a save is under way. Returns how long each rank took to leave, in s."""
    join_from_environment()
    ranks = Ranks(timeout_s=30)
    saver = Saver(Path(folder), CheckpointConfig(asynchronous=True), ranks, say=lambda text: None)
    try:
        with saver:
            saver.save(1, toy_state(1, ranks.rank, RANKS))
            began = time.monotonic()
            if not ranks.is_main:
                raise LocalRunStopped("a shard changed")
            raise AmclipError("a collective of the loop failed")
    except AmclipError:
        return time.monotonic() - began
    raise AssertionError("unreachable")


# ------------------------------------------------------------------ damage


def damage_case(folder: str, damages: list[str]) -> dict[str, Any]:
    """Saves steps 1 and 2 into a folder per damage, damages step 2 there, loads. Returns error and state per damage."""
    from tests.unit.checkpoint.damage import DAMAGES

    join_from_environment()
    ranks = Ranks(timeout_s=30)
    results = {}
    for name in damages:
        root = Path(folder, name)
        with Saver(root, CheckpointConfig(asynchronous=False), ranks, say=lambda text: None) as saver:
            for step in (1, 2):
                saver.save(step, toy_state(step, ranks.rank, RANKS), wait=True)
        if ranks.is_main:
            DAMAGES[name](root)
        dist.barrier()
        results[name] = _try_to_load(root, False, ranks) | {"fallback": _try_to_load(root, True, ranks)}
    return results


def _try_to_load(root: Path, fallback: bool, ranks: Ranks) -> dict[str, Any]:
    """What a resume comes to; whether the state was touched where it was refused."""
    state = toy_state(0, ranks.rank, RANKS)
    try:
        found = load.find(root, "auto", fallback, ranks)
        assert found is not None
        load.fill(found, state, ranks)
    except AmclipError as error:
        return {"error": str(error), "untouched": holds_step(state, 0), "step": None, "notes": []}
    step = found.manifest.step
    return {"error": "", "untouched": False, "step": step, "right": holds_step(state, step), "notes": found.notes}
