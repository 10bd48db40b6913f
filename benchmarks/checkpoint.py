"""What a checkpoint costs: the stall of a save, its write rate, the time to verify and load, of ViT-B and ViT-L state.

    python -m benchmarks.checkpoint --out /tmp/bench [--size vitb16] [--share 2] [--ranks 1 --device cuda]

Two ranks (or one) hold the state that ZeRO-2 gives a rank of `--share` (2: the whole run is these two; 4: they are two
of four, which is how ViT-L fits into little memory). Tensors are real, engines are not built: a save reads nothing else
of them.
Printed per size: seconds training waits (asynchronous and synchronous), one plain copy of the same bytes into touched
memory in the same run, the ratios, the share of a run that saves every 15 minutes, bytes/s against a plain write and
fsync of the same bytes to the same disk, time to verify and to load.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from amclip_ds import config as settings
from amclip_ds.checkpoint import CheckpointConfig, background, files, load
from amclip_ds.checkpoint.ranks import Ranks
from amclip_ds.checkpoint.save import Saver
from amclip_ds.checkpoint.state import CheckpointState
from amclip_ds.engine.shards import Shard
from amclip_ds.method import method_of
from amclip_ds.model.amclip import AClip
from amclip_ds.model.teacher_model import TeacherModel
from amclip_ds.objectives import builder
from amclip_ds.ranks.launcher_env import free_port

EVERY_S = 15 * 60.0


def shapes_of(size: str) -> tuple[dict[str, list[int]], set[str]]:
    """Trained parameters of aclip-SIZE, and which of them the teacher averages."""
    config = settings.load(f"aclip-{size}")
    with torch.device("meta"):
        built = builder(method_of(config).objectives)
        student, teacher = AClip(config.model, built), TeacherModel(config.model, built)
    shapes = {name: list(p.shape) for name, p in student.named_parameters() if p.requires_grad}
    return shapes, {name for name, _ in teacher.named_parameters()} & shapes.keys()


def build_state(size: str, rank: int, share: int, device: str) -> CheckpointState:
    """What rank `rank` of `share` holds at stage 2: a run of the flattened model, random, touched."""
    shapes, averaged = shapes_of(size)
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    length = -(-sum(sizes.values()) // share)
    sharded: dict[str, dict[str, Shard]] = {kind: {} for kind in ("master", "exp_avg", "exp_avg_sq", "ema")}
    at = 0
    for name, numel in sizes.items():
        first, last = max(0, rank * length - at), min(numel, (rank + 1) * length - at)
        for kind in sharded if first < last else ():
            if kind != "ema" or name in averaged:
                sharded[kind][name] = Shard(torch.randn(last - first, device=device), first, last - first, numel)
        at += numel
    return CheckpointState(sharded=sharded, shapes=shapes, small={"run": {"step": 0}}, stage=2, config="a: 1\n")


def plain_copy_s(state: CheckpointState, repeats: int) -> float:
    """Seconds of one copy of the same tensors into host memory that has been touched (and pinned); the median."""
    tensors = [shard.tensor for held in state.sharded.values() for shard in held.values()]
    on_gpu = tensors[0].is_cuda
    target = torch.ones(sum(tensor.numel() for tensor in tensors), pin_memory=on_gpu)
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        began, at = time.perf_counter(), 0
        for tensor in tensors:
            target[at : at + tensor.numel()].copy_(tensor, non_blocking=on_gpu)
            at += tensor.numel()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def disk_rate(folder: Path, state: CheckpointState) -> float:
    """Bytes/s of this rank's plain write and fsync of as many bytes, all ranks at once."""
    planned = files.plan(state, dist.get_rank(), dist.get_world_size())
    num_bytes = sum(file.length for file in planned)
    block = memoryview(bytes(64 << 20))
    dist.barrier()
    began, left = time.perf_counter(), num_bytes
    with (folder / f"plain{dist.get_rank()}").open("wb", buffering=0) as file:
        while left:
            left -= file.write(block[: min(left, len(block))])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    (folder / f"plain{dist.get_rank()}").unlink()
    return num_bytes / seconds


def measure(rank: int, port: int, args: argparse.Namespace, answers: Any) -> None:
    torch.set_num_threads(1)
    if args.device == "cuda":
        torch.cuda.init()
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.ranks, timeout=timedelta(minutes=30)
    )
    ranks, root = Ranks(timeout_s=1800), args.out / args.size
    if ranks.is_main:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
    state = build_state(args.size, rank, args.share, args.device)
    num_bytes = sum(file.length for file in files.plan(state, rank, args.ranks))
    result: dict[str, Any] = {"rank": rank, "bytes": num_bytes, "plain_copy_s": plain_copy_s(state, args.repeats)}
    for mode in ("synchronous", "asynchronous"):
        config = CheckpointConfig(asynchronous=mode == "asynchronous", keep_last=1, timeout_s=1800)
        stalls, totals = [], []
        with Saver(root / mode, config, ranks, say=lambda text: None) as saver:
            for step in range(1, args.repeats + 2):
                dist.barrier()
                began = time.perf_counter()
                saver.save(step, state)
                stalls.append(time.perf_counter() - began)
                saver.finish()
                totals.append(time.perf_counter() - began)
        result[mode] = {
            "first_s": stalls[0],
            "stall_s": statistics.median(stalls[1:]),
            "all_s": stalls,
            "total_s": statistics.median(totals[1:]),
        }
    result["plain_copy_after_s"] = plain_copy_s(state, args.repeats) if _has_room(num_bytes, args.ranks) else None
    result["disk_rate"] = disk_rate(root, state)
    dist.barrier()
    began = time.perf_counter()
    found = load.find(root / "asynchronous", "auto", False, ranks) if args.share == args.ranks else None
    result["verify_s"] = time.perf_counter() - began if found else None
    if found:
        dist.barrier()
        began = time.perf_counter()
        load.fill(found, state, ranks)
        result["load_s"] = time.perf_counter() - began
    answers.put(result)
    dist.barrier()
    dist.destroy_process_group()


def _has_room(num_bytes: int, ranks: int) -> bool:
    return background.available_memory() > 2 * ranks * num_bytes


def report(results: list[dict[str, Any]], size: str, share: int) -> dict[str, Any]:
    """The slowest rank counts: training waits for it."""
    copies = [one["plain_copy_s"] for one in results] + [one["plain_copy_after_s"] or 0.0 for one in results]
    total = sum(one["bytes"] for one in results)
    stall = max(one["asynchronous"]["stall_s"] for one in results)
    synchronous = max(one["synchronous"]["stall_s"] for one in results)
    written_s = max(one["asynchronous"]["total_s"] for one in results)
    rate, disk = total / synchronous, sum(one["disk_rate"] for one in results)
    numbers = {
        "size": size,
        "ranks": f"{len(results)} of {share}",
        "bytes": total,
        "plain_copy_s": max(copies),
        "asynchronous_stall_s": stall,
        "first_asynchronous_stall_s": max(r["asynchronous"]["first_s"] for r in results),
        "synchronous_stall_s": synchronous,
        "asynchronous_written_after_s": written_s,
        "stall_over_plain_copy": stall / max(copies),
        "stall_over_synchronous": stall / synchronous,
        "share_of_run_at_15_min": stall / (EVERY_S + stall),
        "synchronous_bytes_per_s": rate,
        "disk_bytes_per_s": disk,
        "write_rate_over_disk": rate / disk,
        "asynchronous_rate": total / written_s,
        "verify_s": max(one["verify_s"] or 0.0 for one in results),
        "load_s": max(one.get("load_s", 0.0) for one in results),
    }
    for name, value in numbers.items():
        print(f"{name:32s} {value:.4g}" if isinstance(value, float) else f"{name:32s} {value}")
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder on the disk that is measured")
    parser.add_argument("--size", default="vitb16", help="a size of the recipes")
    parser.add_argument("--share", type=int, default=2, help="ranks of the run of which --ranks are here")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="where the state is: cpu | cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    port = free_port()
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=measure, args=(rank, port, args, answers)) for rank in range(args.ranks)]
    for process in processes:
        process.start()
    results = [answers.get(timeout=3600) for _ in processes]
    for process in processes:
        process.join()
    numbers = report(results, args.size, args.share)
    shutil.rmtree(args.out / args.size)
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
