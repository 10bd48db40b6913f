"""Whole training steps on a batch that stays: recipes, exact savings on and off, compile modes, ZeRO stages, sizes.

    python -m benchmarks.step aclip-vitb16 --batch 8 --vary all none                  # savings on against off
    python -m benchmarks.step aclip-vitb16 --batch 8 --vary none last_block patchify  # what each is worth alone
    python -m benchmarks.step clip-vitb16 aclip-vitb16 --batch 256 --set engine.deepspeed=zero1_bf16.json
    python -m benchmarks.step aclip-vitb16 --batch 256 --set engine.compile=tower --out step.jsonl

One process, one row a recipe and variation; their steps take turns, so that what else runs on the machine meets all
alike. A step is the run's own `train_step`: photometric changes, teacher, masks, losses, backward, optimizer, average.
On a CPU in fp32, on a GPU in bf16, at ZeRO 1 unless --set says otherwise. Printed: median, fastest and slowest step,
samples/s, TFLOP of a step as torch counts them, their rate against a large matrix product's in the same process (and
against the maker's peak, where --peak gives it), the device's peak memory (of the process, with all recipes in it:
benchmarks/gpu.py has a process a recipe), and operations (on a GPU: kernels, copies and synchronisations) of one step.

Variations: all (every saving), none (no saving, texts padded to the whole context), the name of one saving alone, or
texts_trimmed (none, but texts cut to the longest of the batch).
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from amclip_ds import config as settings
from amclip_ds import run
from amclip_ds.config import TrainConfig
from amclip_ds.data.batch import Batch
from amclip_ds.data.synthetic import write_dataset
from amclip_ds.method import method_of
from amclip_ds.model.config import TextConfig
from amclip_ds.model.savings import PLAIN, Savings
from amclip_ds.optim import Schedules
from amclip_ds.ranks import runtime as engine_runtime
from amclip_ds.ranks.collectives import DistributedComm
from amclip_ds.ranks.runtime import Runtime
from amclip_ds.resilience.guards import Guards
from amclip_ds.step import train_step

GIB = 1024.0**3
SAVINGS = [field.name for field in dataclasses.fields(Savings)]
TOGETHER = {"one_write": ("patchify", "one_write")}  # a saving within another one
TRIMMED = "texts_trimmed"
VARIATIONS = ("all", "none", TRIMMED, *SAVINGS)
BUCKET = 8


def settings_of(recipe: str, words: list[str], batch: int, scenes: Path) -> TrainConfig:
    """A recipe of `batch` samples a step on one rank; words: settings over the defaults here."""
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    given = {word.partition("=")[0] for word in words}
    defaults = [
        f"data.train={scenes}/train",
        f"run.out={scenes}/run",
        "run.steps=1000",
        "run.epochs=null",
        f"batch.global_size={batch}",
        f"batch.per_gpu={batch}",
        f"engine.deepspeed=zero1_{precision}.json",
        "data.workers=0",
        "engine.compile=none",
        "model.vision.checkpoint_every=0",
    ]
    return settings.load(recipe, [word for word in defaults if word.partition("=")[0] not in given] + words)


def first_batch(config: TrainConfig, runtime: Runtime) -> Batch:
    with closing(run.open_data(config, method_of(config), runtime)) as data:
        return next(data.batches(None))


def made_up(batch: Batch, text: TextConfig, tokens: tuple[int, int], trimmed: bool, device: torch.device) -> Batch:
    """A batch with random pixels, in memory as the loader has them, and with texts of evenly spread lengths."""
    draw = torch.Generator().manual_seed(0)
    images = {"views_uint8": batch.views_uint8, "teacher_uint8": batch.teacher_uint8}
    pixels = {
        name: torch.empty_like(value).copy_(torch.randint(0, 256, value.shape, generator=draw, dtype=torch.uint8))
        for name, value in images.items()
        if value is not None
    }
    count = len(batch.sample_ids)
    ids, lengths = made_texts(count, tokens, text.context_length, text.vocab_size, text.eos_token_id)
    if trimmed:
        ids = ids[:, : min(text.context_length, -(-max(lengths) // BUCKET) * BUCKET)].contiguous()
    return replace(batch, token_ids=ids, text_lengths={"plain": lengths}, **pixels).to(device)


def example(recipe: str, words: list[str], batch: int, tokens: tuple[int, int], scenes: Path) -> Batch:
    """A batch of a recipe on the device, texts padded, without any engine."""
    config, runtime = settings_of(recipe, words, batch, scenes), engine_runtime.start()
    return made_up(first_batch(config, runtime), config.model.text, tokens, False, runtime.device)


def reordered(batch: Batch, order: list[int]) -> Batch:
    """The same samples in another order."""
    first = {"teacher_uint8", "token_ids", "sample_ids", "masked_ids", "cloze_ids"}
    found = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    moved = {
        name: value[order] if name in first else value[:, order]
        for name, value in found.items()
        if torch.is_tensor(value)
    }
    lengths = {name: tuple(of[row] for row in order) for name, of in batch.text_lengths.items()}
    table = batch.photometric.table[:, order]
    return replace(batch, photometric=replace(batch.photometric, table=table), text_lengths=lengths, **moved)


class Ours:
    """The engines of a recipe and a batch that stays on the device."""

    def __init__(self, recipe: str, words: list[str], batch: int, tokens: tuple[int, int], scenes: Path) -> None:
        self.config = settings_of(recipe, words, batch, scenes)
        self.method = method_of(self.config)
        self.runtime = engine_runtime.start()
        whole, text, device = first_batch(self.config, self.runtime), self.config.model.text, self.runtime.device
        self.batches = {trimmed: made_up(whole, text, tokens, trimmed, device) for trimmed in (False, True)}
        self.student, self.teacher = run.build_engines(self.config, self.method, self.runtime)
        self.comm, self.guards = DistributedComm(), Guards(self.config.guards)
        self.schedules = Schedules(self.config.optim, self.config.teacher, 1000)

    def step(self, variation: str = "all") -> Any:
        chosen = savings_of(variation)
        self.student.savings = chosen
        for model in (self.student.module, *([self.teacher.placed.module] if self.teacher else [])):
            model.vision.savings = model.text.savings = chosen  # type: ignore[union-attr,assignment]
        batch = self.batches[variation in ("all", TRIMMED)]
        return train_step(
            batch,
            self.student,
            self.teacher,
            self.schedules,
            5,
            self.method,
            self.comm,
            len(batch.sample_ids),
            self.guards,
        )


def savings_of(variation: str) -> Savings:
    if variation == "all":
        return Savings()
    names = TOGETHER.get(variation, (variation,)) if variation in SAVINGS else ()
    return replace(PLAIN, **dict.fromkeys(names, True))


def made_texts(
    count: int, tokens: tuple[int, int], context: int, vocab: int, end: int
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Random words between start and end token, from the least to the most tokens: ids [B, context], and lengths."""
    draw = torch.Generator().manual_seed(1)
    least, most = tokens
    lengths = [least + round((most - least) * row / max(1, count - 1)) for row in range(count)]
    lengths = [lengths[row] for row in torch.randperm(count, generator=draw).tolist()]
    ids = torch.zeros(count, context, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, min(vocab, end) - 2, (length,), generator=draw)
        ids[row, length - 1] = end
    return ids, tuple(lengths)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(works: dict[str, Callable[[], Any]], repeats: int, warm: int) -> dict[str, list[float]]:
    """Wall seconds of each work, `repeats` times, one after the other in turn."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(warm + repeats):
        for name, work in works.items():
            synchronise()
            began = time.perf_counter()
            work()
            synchronise()
            if turn >= warm:
                times[name].append(time.perf_counter() - began)
    return times


def flops_of(work: Callable[[], Any]) -> int:
    """Floating point operations of the matrix products and attentions of one run of `work`."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on random data: the median of 7."""
    on_gpu = torch.cuda.is_available()
    side = 8192 if on_gpu else 1024
    left, right = (torch.randn(side, side, device="cuda" if on_gpu else "cpu", dtype=dtype) for _ in range(2))
    times = take_turns({"product": lambda: left @ right}, 7, 3)["product"]
    return 2 * side**3 / statistics.median(times)


def operations_of(work: Callable[[], Any]) -> dict[str, int]:
    """What one run of `work` starts: on a GPU launches, copies and synchronisations, on a CPU operators."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *activities]) as seen:
        work()
        synchronise()
    counts = {event.key: event.count for event in seen.key_averages()}
    if not activities:
        return {"operators": sum(count for key, count in counts.items() if key.startswith("aten::"))}
    kinds = {
        "launches": ("LaunchKernel", "GraphLaunch"),
        "copies": ("cudaMemcpy",),
        "synchronisations": ("Synchronize",),
    }
    return {
        kind: sum(count for key, count in counts.items() if any(part in key for part in parts))
        for kind, parts in kinds.items()
    }


def row_of(name: str, batch: int, times: list[float], flops: int, rate: float, peak: float | None) -> dict[str, Any]:
    """One line of the table."""
    step_s = statistics.median(times)
    return {
        "name": name,
        "batch": batch,
        "step_s": step_s,
        "fastest_s": min(times),
        "slowest_s": max(times),
        "samples_per_s": batch / step_s,
        "tflop": flops / 1e12,
        "matrix_tflops": rate / 1e12,
        "mfu_of_matrix_rate": flops / step_s / rate,
        "mfu_of_peak": flops / step_s / peak / 1e12 if peak else None,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None,
    }


def show(row: dict[str, Any], against: float | None = None) -> None:
    ratio = f"  x {against / row['step_s']:.3f}" if against else ""
    memory = f"  {row['peak_memory_gib']:.1f} GiB" if row["peak_memory_gib"] is not None else ""
    more = "  ".join(
        f"{key} {row[key]}" for key in ("operators", "launches", "copies", "synchronisations") if key in row
    )
    print(
        f"{row['name']:44} {row['step_s'] * 1e3:9.1f} ms [{row['fastest_s'] * 1e3:.1f}, {row['slowest_s'] * 1e3:.1f}]"
        f"  {row['samples_per_s']:9.2f}/s  {row['tflop']:.3f} TFLOP  {row['mfu_of_matrix_rate']:6.1%}{memory}{ratio}"
        f"  {more}",
        flush=True,
    )


@contextmanager
def made_scenes(batch: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="step-") as folder:
        scenes = Path(folder, "scenes")
        write_dataset(scenes, max(64, batch), 0, 64, 0)
        yield scenes


def two_numbers(text: str) -> tuple[int, int]:
    least, _, most = text.partition("-")
    return int(least), int(most or least)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vary", nargs="+", default=["all"], choices=VARIATIONS, metavar="VARIATION")
    parser.add_argument("--tokens", type=two_numbers, default=(20, 20), metavar="N[-M]", help="of a caption")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--peak", type=float, help="the maker's TFLOP/s")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="a file that the rows are added to, JSON lines")
    args = parser.parse_args()
    with made_scenes(args.batch) as scenes:
        engines = {recipe: Ours(recipe, args.set, args.batch, args.tokens, scenes) for recipe in args.recipes}
    works = {
        f"{recipe} {variation}": (lambda engine=engine, variation=variation: engine.step(variation))
        for recipe, engine in engines.items()
        for variation in args.vary
    }
    times = take_turns(works, args.repeats, args.warm)
    first = next(iter(engines.values()))
    rate = matrix_rate(first.student.dtype)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{device}, torch {torch.__version__}, {first.student.dtype}, {first.config.engine.deepspeed}, compile"
        f" {first.student.compile_mode}, batch {args.batch}, captions of {args.tokens} tokens, a matrix product"
        f" {rate / 1e12:.3f} TFLOP/s; medians of {args.repeats}, x: against the first row"
    )
    against = None
    for name, work in works.items():
        row = row_of(name, args.batch, times[name], flops_of(work), rate, args.peak) | operations_of(work)
        show(row, against)
        against = against or row["step_s"]
        if args.out:
            with args.out.open("a") as file:
                print(json.dumps(row | {"device": device, "set": args.set}), file=file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
