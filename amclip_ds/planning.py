"""From the words of `amclip plan` to plans: which GPUs, how long an epoch is, how fast; and the probe."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from amclip_ds.config import TrainConfig
from amclip_ds.errors import UserError
from amclip_ds.plan.gpus import Gpu, Rate, gpu_of
from amclip_ds.plan.planner import GIB, Ask, Plan, make_plan, samples_of
from amclip_ds.plan.work import TERA
from amclip_ds.sizes import read_size

if TYPE_CHECKING:
    from amclip_ds.probe import Probe


def plans(config: TrainConfig, args: argparse.Namespace, names: list[str]) -> "tuple[list[Plan], Probe | None]":
    """A plan a kind of GPU, in the order given, and what was measured. Raises UserError."""
    if args.probe and (args.gpu or args.mfu):
        raise UserError("--probe: measures the GPU that is here; leave --gpu and --mfu out")
    gpus = [] if args.probe else [_with_memory(gpu_of(name), args.gpu_memory) for name in names]
    found = samples_of(config)
    samples, source, sample_bytes = found or (None, "", None)
    if args.samples is not None:
        samples, source = args.samples, "--samples"
    per_node = args.gpus_per_node or min(8, args.gpus)
    measured = None
    if args.probe:
        from amclip_ds.probe import probe  # it loads torch and DeepSpeed

        measured = probe(config)
        gpus = [_with_memory(measured.gpu, args.gpu_memory)]
    made = []
    for gpu in gpus:
        ask = Ask(
            gpus=args.gpus,
            gpu=gpu,
            gpus_per_node=per_node,
            samples=samples,
            samples_source=source,
            text_tokens=args.text_tokens,
            rate=measured.rate if measured else _own_rate(gpu, args.mfu),
            bandwidth=args.bandwidth * 1e9 if args.bandwidth else None,
            price=args.price,
            sample_bytes=sample_bytes,
        )
        made.append(make_plan(config, ask))
    return made, measured


def _with_memory(gpu: Gpu, size: str | None) -> Gpu:
    return gpu if size is None else dataclasses.replace(gpu, memory_gib=read_size(size) / GIB)


def _own_rate(gpu: Gpu, mfu: float | None) -> Rate | None:
    if mfu is None:
        return None
    if gpu.peak_tflops is None:
        raise UserError(f"--mfu: the peak of {gpu.name} is not known")
    return Rate(mfu * gpu.peak_tflops * TERA, f"--mfu {mfu:g} of {gpu.peak_tflops:g} TFLOP/s")
