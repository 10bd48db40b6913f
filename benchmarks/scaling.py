"""How a step grows with the ranks: measured here (weak scaling), and a stated model for GPUs that are not here.

    python -m benchmarks.scaling measure aclip-tiny --ranks 1 2 4 --per-rank 16     # on this machine
    python -m benchmarks.scaling model aclip-vitb16 --gpus 8 64 512 --per-rank 256 --rate 330 --intra 400 --inter 50

`measure` trains a few steps by `amclip train --procs N`, the batch growing with the ranks, and prints the median step,
its communication and the efficiency (the step of the first row over the row's). On a CPU all ranks share its cores:
give --threads so that each keeps the same.

`model` is arithmetic, no measurement, and says so: computation = the operations of a step (amclip plan's) over --rate
TFLOP/s that one GPU reaches; the gradients' reduction and the weights' gathering at the stage of engine.deepspeed, the
teacher's publishing, and the gathering of what the losses compare (loss.exchange=gather), each as a ring: a pass is
(n-1)/n of the bytes, a gather or a reduce-scatter takes one, an all-reduce two, over the slower of the links on its way
(--intra GB/s within a node of --node GPUs, --inter GB/s a GPU between nodes), plus --latency us a hop. What is small
(sums of batch norms, the norm) is left out. --overlap says which share of the backward pass (two thirds of the
computation) the reduction may hide behind; the rest is exposed and added.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from amclip_ds import config as settings
from amclip_ds.data.synthetic import write_dataset
from amclip_ds.engine.ds_config import is_flat, read_ds_config
from amclip_ds.jsonl import read_lines
from amclip_ds.plan.work import Work, flops_of, work_of

MASTERS = 4  # bytes of a reduced gradient: communication_data_type fp32 in every file of ds_configs/


def ring_s(size: float, ranks: int, passes: float, gb_s: float, latency_s: float) -> float:
    """Seconds of a ring over `ranks`: passes (1: gather or scatter, 2: both) of (n-1)/n of the bytes, and its hops."""
    if ranks == 1:
        return 0.0
    return passes * (ranks - 1) / ranks * size / (gb_s * 1e9) + passes * (ranks - 1) * latency_s


def parts_of_step(work: Work, gpus: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step by part, on so many GPUs."""
    link = args.intra if gpus <= args.node else args.inter
    latency = args.latency * 1e-6
    trained = sum(parameter.numel() for parameter in work.student.values() if parameter.requires_grad)
    published = sum(parameter.numel() for name, parameter in work.teacher.items() if not name.startswith("text"))
    compute = flops_of(work).executed / (args.rate * 1e12)
    reduce_s = ring_s(MASTERS * trained, gpus, gradient_passes(work), link, latency)
    hidden = min(reduce_s, args.overlap * compute * 2 / 3)
    weights = {0: 0, 1: 1, 2: 1, 3: 2}[work.stage]  # after the step; at stage 3 in the forward and in the backward
    return {
        "compute": compute,
        "gradients": reduce_s - hidden,
        "weights": ring_s(work.bytes * trained, gpus, weights, link, latency) if weights else 0.0,
        "teacher": ring_s(work.bytes * published, gpus, 1, link, latency) if work.stage else 0.0,
        # Gathered in the forward pass, their gradients reduced and scattered in the backward pass.
        "embeddings": sum(ring_s(size, gpus, 2, link, latency) for size in gathered(work)),
    }


def gradient_passes(work: Work) -> int:
    """1: reduce-scatter, of flat gradients and at ZeRO 3; 2: all-reduce, which DeepSpeed makes of buckets of gradients
    elsewhere (use_multi_rank_bucket_allreduce) and of Muon's at ZeRO 3 too."""
    engine, optimizer = work.config.engine, work.config.optim.name
    scatters = is_flat(read_ds_config(engine), engine, optimizer) or (work.stage == 3 and optimizer != "muon")
    return 1 if scatters else 2


def gathered(work: Work) -> list[float]:
    """Bytes of each tensor of all ranks' rows that the losses of the recipes gather, in fp32."""
    model, views = work.config.model, len(work.views)
    widths = {
        "contrastive": [views * model.embed_dim, model.embed_dim],
        "simclr": [2 * work.config.heads.output_dim],
        "occlusion": [2 * work.tower.width],
    }
    rows = work.batch.local * work.world
    return [4.0 * rows * width for name in work.parts for width in widths.get(name, [])]


def model(args: argparse.Namespace) -> int:
    print(
        f"{args.recipe}, {args.per_rank} samples a GPU: a MODEL, not measured: {args.rate} TFLOP/s a GPU, {args.intra}"
        f" GB/s within {args.node} GPUs, {args.inter} GB/s between, {args.latency} us a hop, {args.overlap:.0%} of the"
        f" backward pass can hide the reduction"
    )
    first = None
    for gpus in args.gpus:
        size = args.per_rank * gpus
        words = [f"batch.global_size={size}", f"batch.per_gpu={args.per_rank}", *args.set]
        parts = parts_of_step(work_of(settings.load(args.recipe, words), gpus, args.tokens), gpus, args)
        step_s = sum(parts.values())
        first = first or step_s
        reported = "  ".join(f"{part} {seconds * 1e3:.1f}" for part, seconds in parts.items())
        rate = f"{size / step_s:12,.0f} samples/s  {first / step_s:6.1%}"
        print(f"{gpus:5} GPUs  {step_s * 1e3:8.1f} ms  {rate}  ({reported} ms)")
    return 0


def measure(args: argparse.Namespace) -> int:
    first = None
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        scenes = Path(folder, "scenes")
        write_dataset(scenes, max(64, args.per_rank * max(args.ranks) * args.steps), 0, 64, 0)
        for ranks in args.ranks:
            rows = run_once(args, Path(folder, f"run{ranks}"), scenes, ranks)
            step_s, waited = (statistics.median(row[key] for row in rows) for key in ("step_s", "communication_s"))
            first = first or step_s
            size = args.per_rank * ranks
            rate = f"{size / step_s:8.1f} samples/s, {first / step_s:.1%} of the first row's speed a rank"
            print(
                f"{ranks:3} ranks x {args.per_rank}: {step_s * 1e3:8.1f} ms, communication {waited * 1e3:.1f} ms,"
                f" {rate}",
                flush=True,
            )
    return 0


def run_once(args: argparse.Namespace, run: Path, scenes: Path, ranks: int) -> list[dict[str, Any]]:
    """The rows of a short run, the first steps left out."""
    words = [
        f"data.train={scenes}/train",
        f"run.out={run}",
        f"run.steps={args.steps}",
        "log.every_steps=1",
        f"batch.global_size={args.per_rank * ranks}",
        f"batch.per_gpu={args.per_rank}",
        "optim.warmup_steps=0",
        "data.workers=0",
        "log.tensorboard=false",
        *args.set,
    ]
    command = [sys.executable, "-m", "amclip_ds", "train", args.recipe, *words, "--procs", str(ranks)]
    subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)}, check=True, stdout=subprocess.DEVNULL
    )
    return read_lines(run / "metrics.jsonl")[args.warm :]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    here = kinds.add_parser("measure", help="weak scaling over ranks of this machine")
    here.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    here.add_argument("--steps", type=int, default=12)
    here.add_argument("--warm", type=int, default=4, help="steps that do not count")
    here.add_argument("--threads", type=int, default=1, help="of a rank")
    here.set_defaults(work=measure)
    there = kinds.add_parser("model", help="computation and collectives at stated speeds")
    there.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    there.add_argument("--node", type=int, default=8, help="GPUs of a node")
    there.add_argument("--rate", type=float, required=True, help="TFLOP/s that a GPU reaches in a step")
    there.add_argument("--intra", type=float, default=400.0, help="GB/s of a GPU within its node")
    there.add_argument("--inter", type=float, default=50.0, help="GB/s of a GPU between nodes")
    there.add_argument("--latency", type=float, default=10.0, help="microseconds of a hop")
    there.add_argument("--overlap", type=float, default=0.0, help="share of the backward pass behind which it may hide")
    there.add_argument("--tokens", type=int, help="of the longest caption of a batch")
    there.set_defaults(work=model)
    for kind in (here, there):
        kind.add_argument("recipe", metavar="RECIPE")
        kind.add_argument("--per-rank", type=int, default=16, help="samples")
        kind.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    return args.work(args)


if __name__ == "__main__":
    sys.exit(main())
