"""Whole training steps on one GPU, side by side with other trainers: samples/s, MFU, peak memory, launches, by cell.

    python -m benchmarks.gpu --out gpu.jsonl                                   # the usual cells
    python -m benchmarks.gpu --out gpu.jsonl --cells aclip-vitb16,engine.compile=tower clip-vitb16 open_clip:b16
    python -m benchmarks.gpu --out gpu.jsonl --baseline CHECKOUT --cells base:aclip-vitb16 aclip-vitb16
    python -m benchmarks.gpu --out gpu.jsonl --cells owed --data SHARDS --release CHECKOUT --timm FOLDER --patience 400

A cell is a recipe and settings behind commas (this program's own: batch=N, samples a step; vary=a+b, rows of
benchmarks/step.py's variations; inductor=a+b, switches of torch._inductor.config that are put on in a compiled cell),
`open_clip:b16` and `open_clip-compiled:b16`, `release:b16` (the published A-CLIP, by --release and --timm as in
benchmarks/peers.py), `fed:RECIPE` (the step fed by the loader from --data, at the rate at which it makes batches,
beside a batch that stays), or `exact:RECIPE` and `exact-fp32:RECIPE` (savings and compiled towers against neither;
they fail where the first loss differs by more than 1e-5 in fp32, and one of 20 in bf16 by more than 3 times what
another order of the samples does: in fp32 heads and AdamW make 1e-2 of rounding within five steps). Two names are lists
of cells (SETS): usual, and owed, what docs/results/gpu-compiled.md names as not measured, the goals first; cells of
them whose --data or --release is not given are left out. owed takes about ten minutes on 16 cores and a card of 140 GB
(one of 80 GB does not hold all of it at once: longer); what was not built in --patience is named at the end, and a
second call with those cells finds most of their graphs in the compiler's cache.
base:CELL runs the amclip_ds of another checkout (--baseline). Each has a process of its own, since ZeRO-3 patches
torch; they build and compile side by side, as many as --room and the device's memory allow (a ViT-L takes two places).
Once all are built, or all that fit, they are measured one at a time, while nothing else runs: medians of --repeats
steps by the device's clock, one batch that stays. A step is the run's own `train_step`. A cell of which a part was not
compiled as asked says so in its row, and fails. MFU is against a bf16 matrix product of 8192 cubed in the same process.
--traces keeps the profiler's view of three steps of each cell. The table comes last.
"""

import argparse
import fcntl
import gzip
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amclip_ds.data.batch import Batch
from amclip_ds.data.loader import CHUNK
from benchmarks import peers
from benchmarks import step as steps

OURS = ["clip", "aclip", "aclip-eff", "random2x"]
TOWER = "engine.compile=tower"
SETS = {
    "usual": ["open_clip:b16", "open_clip-compiled:b16", *(f"{name}-vitb16,{TOWER}" for name in OURS), "aclip-vitb16"],
    "owed": [
        "open_clip-compiled:b16",
        *(f"{name}-vitb16,{TOWER}" for name in ("aclip", "aclip-eff", "clip")),
        f"aclip-vitl16,{TOWER}",
        f"fed:aclip-vitb16,{TOWER}",
        f"aclip-vitb16,{TOWER},engine.deepspeed=zero2_bf16.json",
        "aclip-vitb16,engine.compile=auto,engine.deepspeed=zero3_bf16.json",
        *(f"aclip-vitb16,{TOWER},engine.fp8={which}" for which in ("teacher", "all")),
        "exact:aclip-vitb16,batch=64",
        "exact-fp32:aclip-vitb16,batch=32",
        "release:b16",
        "open_clip:b16",
    ],
}
NEEDS = {"fed": "data", "release": "release"}  # kind of a cell -> the argument without which it cannot run
BATCHES = {"vitb16": 256, "vitl16": 128, "tiny": 64}
FED_STEPS = 40
EXACT_STEPS = 20
FP32_LIMIT = 1e-5  # of the first loss's relative difference
SPREADS = 3  # in bf16: of the difference that another order of the samples makes
PLACE_GIB = 24  # of the device that a place may take while its cell is built; once it is built it holds about 5
START, MEASURE, WAIT = "start", "measure", "wait"
GIB = 1024.0**3


def wait_for_turn(args: argparse.Namespace) -> None:
    """Until every cell is built: what is held only between steps goes back to the device meanwhile."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    built_file(args.out, os.getpid()).touch()
    while not args.out.with_suffix(".go").exists():
        time.sleep(0.05)


def built_file(out: Path, process: int) -> Path:
    return out.with_name(f"built-{process}")


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One process at a time."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


def device_seconds(work: Callable[[], Any], repeats: int, warm: int) -> list[float]:
    """The device's seconds of each call, after `warm` calls that do not count."""
    for _ in range(warm):
        work()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) / 1e3 for first, last in zip(events, events[1:])]


def seen_by_profiler(work: Callable[[], Any], trace: Path | None) -> dict[str, Any]:
    """Of one step: seconds in which the device computed, what it started and waited for, the largest kernels. trace:
    where three steps in a row are kept for a viewer."""
    from torch.profiler import ProfilerActivity, profile

    if trace:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as several:
            for _ in range(3):
                work()
            torch.cuda.synchronize()
        plain = trace.with_suffix("")
        several.export_chrome_trace(str(plain))
        trace.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    averages = seen.key_averages()
    on_device = {
        e.key: e.self_device_time_total / 1e6
        for e in averages
        if e.device_type.name == "CUDA" and not e.is_user_annotation  # which span kernels, as in record/profiling.py
    }
    counts = {event.key: event.count for event in averages}
    kinds = {
        "launches": ("LaunchKernel", "GraphLaunch"),
        "copies": ("cudaMemcpy",),
        "synchronisations": ("Synchronize",),
    }
    largest = sorted(on_device.items(), key=lambda item: -item[1])[:40]
    return {
        "device_s": sum(on_device.values()),
        **{k: sum(n for key, n in counts.items() if any(part in key for part in parts)) for k, parts in kinds.items()},
        "largest": [[name[:90], round(seconds * 1e3, 2)] for name, seconds in largest],
    }


def expanded(args: argparse.Namespace) -> list[str]:
    """The cells that are asked for, lists by their names. Raises SystemExit for one without the argument it needs."""
    cells = []
    for word in args.cells:
        for cell in SETS.get(word, [word]):
            needed = NEEDS.get(cell.removeprefix("base:").partition(":")[0])
            if needed is None or getattr(args, needed) is not None:
                cells.append(cell)
            elif word in SETS:
                print(f"{cell}: left out, it needs --{needed}", flush=True)
            else:
                raise SystemExit(f"{cell}: it needs --{needed}")
    return list(dict.fromkeys(cells))


def parse_cell(cell: str, compiles: bool = False) -> tuple[str, int, list[str], list[str]]:
    """Recipe, samples a step, variations and settings of a cell of ours. Puts its switches of torch on.

    compiles: whether it compiles whatever its settings say. Raises SystemExit for switches that would change nothing.
    """
    recipe, *words = cell.split(",")
    own = dict(word.split("=", 1) for word in words if word.startswith(("batch=", "vary=", "inductor=")))
    others = [word for word in words if word.partition("=")[0] not in own]
    if "inductor" in own:
        if not compiles and not {"engine.compile=tower", "engine.compile=block", "engine.compile=auto"} & set(others):
            raise SystemExit(f"{cell}: inductor= changes nothing without engine.compile=tower (or block)")
        switch_on(own["inductor"].split("+"))
    batch = int(own.get("batch", BATCHES[recipe.rpartition("-")[2]]))
    return recipe, batch, own.get("vary", "all").split("+"), others


def switch_on(names: list[str]) -> None:
    """Puts switches of torch._inductor.config on. Raises SystemExit for one that there is not, or that cannot work."""
    for name in names:
        try:
            setattr(torch._inductor.config, name, True)
        except AttributeError:
            raise SystemExit(f"inductor={name}: torch {torch.__version__} has no such switch") from None
    if "cpp_wrapper" not in names:
        return
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None:
        raise SystemExit("inductor=cpp_wrapper: it needs the CUDA toolkit, and CUDA_HOME is not set")
    if "triton.cudagraphs" in names:
        torch._inductor.config.graph_partition = False  # with it the C++ wrapper leaves CUDA graphs out


@contextmanager
def heard_fallbacks() -> Iterator[list[str]]:
    """What engine.compile warns of inside: parts that run uncompiled."""
    found: list[str] = []
    show = warnings.showwarning

    def heard(message: Warning | str, *about: Any, **named: Any) -> None:
        if str(message).startswith("engine.compile"):
            found.append(str(message))
        show(message, *about, **named)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="engine.compile")
        warnings.showwarning = heard
        yield found


def build(args: argparse.Namespace, cell: str) -> tuple[int, dict[str, Callable[[], Any]]]:
    """Samples a step, and the steps of a cell by their names."""
    kind, _, rest = cell.rpartition(":")
    if kind in ("open_clip", "open_clip-compiled", "release"):
        theirs, ours, published = peers.SIZES[rest]
        batch = BATCHES[ours]
        with steps.made_scenes(batch) as scenes:
            two = steps.example("aclip-" + ours, [], batch, args.tokens, scenes)
        images = peers.photometric.normalise(two.views_uint8)
        if kind == "release":
            assert two.teacher_uint8 is not None
            teacher = peers.photometric.normalise(two.teacher_uint8)
            work = peers.release_step(args.release, args.timm, published, images, teacher, two.boxes, two.token_ids)
            return batch, {cell: work}
        one = images[0].clone()  # its peak is without our second view and the teacher's crop
        return batch, {cell: peers.open_clip_step(theirs, one, two.token_ids, compiled=kind == "open_clip-compiled")}
    recipe, batch, variations, words = parse_cell(rest)
    with steps.made_scenes(batch) as scenes:
        engine = steps.Ours(recipe, words, batch, args.tokens, scenes)
    names = [cell] if variations == ["all"] else [f"{cell} {variation}" for variation in variations]

    def step(variation: str) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        engine.step(variation)

    return batch, {name: (lambda v=v: step(v)) for name, v in zip(names, variations)}


def measure(args: argparse.Namespace, cell: str) -> list[dict[str, Any]]:
    began = time.perf_counter()
    batch, works = build(args, cell)
    built = time.perf_counter()
    for work in works.values():  # compiles
        work()
    torch.cuda.synchronize()
    facts = {"built_s": built - began, "first_step_s": time.perf_counter() - built}
    rows = []
    wait_for_turn(args)
    with alone(args.out.with_suffix(".lock")):
        rate = steps.matrix_rate(torch.bfloat16)
        for name, work in works.items():
            work()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            times = device_seconds(work, args.repeats, 4)
            peak_memory = torch.cuda.max_memory_allocated() / GIB
            flops = steps.flops_of(work)
            row = steps.row_of(name, batch, times, flops, rate, args.peak) | {"peak_memory_gib": peak_memory}
            file = "".join(letter if letter.isalnum() else "-" for letter in name) + ".json.gz"
            trace = args.traces / file if args.traces else None
            rows.append(row | seen_by_profiler(work, trace) | facts)
    return rows


def drain(batches: Iterator[Any], workers: int, prefetch: int, batch_size: int) -> None:
    """Takes as many batches as workers and the thread behind them may have made ahead: the next ones come at the rate
    at which they are made."""
    chunks_of_a_batch = -(-batch_size // CHUNK)
    for _ in range(-(-workers * prefetch // chunks_of_a_batch) + 2):
        next(batches)


def measure_fed(args: argparse.Namespace, cell: str) -> list[dict[str, Any]]:
    """Wall seconds of a step: the resident batch, the loader's, the resident batch again. Captions are those of
    --tokens in all: a new length would be compiled while it is measured."""
    from amclip_ds import run

    recipe, batch_size, _, words = parse_cell(cell.removeprefix("fed:"))
    words += [f"data.train={args.data}", f"data.workers={args.workers}"]
    engine = steps.Ours(recipe, words, batch_size, args.tokens, args.out.parent)
    data = run.open_data(engine.config, engine.method, engine.runtime)
    began = time.perf_counter()
    batches, texts = data.batches(None), engine.batches[True]

    def fetched() -> Batch:
        batch = next(batches).to(engine.runtime.device)
        return replace(batch, token_ids=texts.token_ids, text_lengths=texts.text_lengths)

    first = fetched()
    first_s = time.perf_counter() - began

    def wall(fetch: Callable[[], Any]) -> tuple[float, float]:
        torch.cuda.synchronize()
        waited, start = 0.0, time.perf_counter()
        for _ in range(FED_STEPS):
            asked = time.perf_counter()
            engine.batches[True] = fetch()
            waited += time.perf_counter() - asked
            engine.step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / FED_STEPS, waited / FED_STEPS

    for _ in range(2):
        engine.batches[True] = fetched()
        engine.step()
    wait_for_turn(args)
    with alone(args.out.with_suffix(".lock")):
        before, _ = wall(lambda: first)
        drain(batches, args.workers, engine.config.data.prefetch, batch_size)
        fed, waited = wall(fetched)
        after, _ = wall(lambda: first)
    return [
        {
            "name": cell,
            "batch": batch_size,
            "workers": args.workers,
            "first_batch_s": first_s,
            "resident_step_s": [before, after],
            "step_s": fed,
            "waited_s": waited,
            "fed_over_resident": 2 * fed / (before + after),
        }
    ]


def first_step(engine: steps.Ours, variation: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of one step, and the averaged gradients that it went by, by name (flat gradients, one rank)."""
    student, take, found = engine.student, engine.student.step, {}

    def step(*words: Any) -> Any:
        parts = {name: student.flat.of(parameter) for name, parameter in student.module.named_parameters()}
        found.update({name: part.tensor.clone() for name, part in parts.items() if part is not None})
        return take(*words)

    student.step = step  # type: ignore[method-assign]
    loss = float(engine.step(variation).loss)
    student.step = take  # type: ignore[method-assign]
    return loss, found


def measure_exact(args: argparse.Namespace, cell: str) -> list[dict[str, Any]]:
    """Savings and compiled towers against neither: the smallest cosines of a gradient of the first step, and of the
    losses the furthest, beside what another order of the samples does to the eager ones."""
    kind, _, rest = cell.partition(":")
    recipe, batch, _, words = parse_cell(rest, compiles=True)
    num_losses = 1 if kind == "exact-fp32" else EXACT_STEPS

    def follow(compiled: bool, reverse: bool = False) -> tuple[list[float], dict[str, torch.Tensor]]:
        file = f"zero1_{'fp32' if kind == 'exact-fp32' else 'bf16'}.json"
        chosen = [f"engine.deepspeed={file}", f"engine.compile={'tower' if compiled else 'none'}"]
        with steps.made_scenes(batch) as scenes:
            engine = steps.Ours(recipe, words + chosen, batch, args.tokens, scenes)
            whole = steps.first_batch(engine.config, engine.runtime)  # its scenes: on noise the heads amplify rounding
        variation = "all" if compiled else "none"
        whole = steps.reordered(whole, list(range(batch - 1, -1, -1))) if reverse else whole
        engine.batches = dict.fromkeys(engine.batches, whole.to(engine.runtime.device))
        loss, gradients = first_step(engine, variation)
        return [loss, *(float(engine.step(variation).loss) for _ in range(num_losses - 1))], gradients

    plain, gradients = follow(False)
    turned, other_gradients = follow(False, reverse=True)
    fast, fast_gradients = follow(True)

    def furthest(losses: list[float]) -> float:
        return float(np.max([abs(one - other) / abs(one) for one, other in zip(plain, losses)]))  # NaN wins

    def smallest(others: dict[str, torch.Tensor]) -> list[tuple[float, str]]:
        cosine = torch.nn.functional.cosine_similarity
        return sorted((round(float(cosine(g, others[name], dim=0)), 6), name) for name, g in gradients.items())

    found = smallest(fast_gradients)
    limit = FP32_LIMIT if kind == "exact-fp32" else SPREADS * furthest(turned)
    return [
        {
            "name": cell,
            "batch": batch,
            "wrong": beyond(furthest(fast), limit),
            "cosines_compiled": found[:6],
            "under_0.9999": sum(value < 0.9999 for value, _ in found),
            "tensors": len(found),
            "cosines_reordered": smallest(other_gradients)[:6],
            "under_0.9999_reordered": sum(value < 0.9999 for value, _ in smallest(other_gradients)),
            "losses_reordered": furthest(turned),
            "losses_compiled": furthest(fast),
            "losses": [plain[0], plain[-1]],
        }
    ]


def beyond(difference: float, limit: float) -> str:
    """Why losses are too far from the eager ones; empty where they are not."""
    is_within = difference <= limit  # not where either is NaN
    return "" if is_within else f"losses differ by {difference:.1e}, at most {limit:.1e} is allowed"


KINDS = {"fed": measure_fed, "exact": measure_exact, "exact-fp32": measure_exact}


def run_cell(args: argparse.Namespace) -> None:
    with heard_fallbacks() as not_compiled:
        rows = KINDS.get(args.cell.partition(":")[0], measure)(args, args.cell.removeprefix("base:"))
    with args.out.open("a") as file:
        for row in rows:
            row["name"] = ("base:" if args.cell.startswith("base:") else "") + row["name"]
            row["not_compiled"] = not_compiled
            text = json.dumps({key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()})
            print(text, file=file)
            print(text[:160], flush=True)
    is_wrong = any(row.get("wrong") for row in rows)
    os._exit(int(bool(not_compiled) or is_wrong))  # without taking the loader's workers and NCCL down


def places_of(cell: str) -> int:
    return 2 if "vitl16" in cell or cell.startswith("release:") else 1


def next_move(cell: str, taken: int, running: int, free_gib: float, room: int) -> str:
    """What to do about the next cell. taken: places of those that are being built, among `running` of which the others
    are built. Those are measured before it where it does not fit beside them, and leave the device."""
    places = taken + places_of(cell)
    if not running or (places <= room and free_gib >= PLACE_GIB * places):
        return START
    return WAIT if taken else MEASURE


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if "matrix_tflops" not in row:
            print({key: value for key, value in row.items() if key != "largest"})
            continue
        print(
            f"{row['name'][:72]:72} {row['step_s'] * 1e3:6.1f} ms {row['samples_per_s']:6.0f}/s device"
            f" {row['device_s'] * 1e3:6.1f} ms  MFU {row['mfu_of_matrix_rate']:5.1%}  {row['peak_memory_gib']:5.1f} GiB"
            f"  {row['tflop']:.1f} TFLOP  launches {row['launches']} copies {row['copies']} syncs"
            f" {row['synchronisations']}  built {row['built_s']:.0f} first {row['first_step_s']:.0f} s"
            f"{'  NOT COMPILED' if row.get('not_compiled') else ''}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the rows go (JSON lines)")
    parser.add_argument("--cells", nargs="*", default=["usual"], help="cells, or a list of them: " + ", ".join(SETS))
    parser.add_argument("--tokens", type=steps.two_numbers, default=(77, 77), metavar="N[-M]", help="of a caption")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--room", type=int, default=3, help="cells of ViT-B/16 that are built at a time")
    parser.add_argument("--patience", type=float, default=240, help="seconds after which what is built is measured")
    parser.add_argument("--peak", type=float, help="the maker's TFLOP/s")
    parser.add_argument("--baseline", type=Path, help="another checkout, for the cells base:...")
    parser.add_argument("--data", type=Path, help="shards of real photographs, for the cells fed:...")
    parser.add_argument("--workers", type=int, default=14, help="of the fed cell")
    parser.add_argument("--release", type=Path, metavar="CHECKOUT", help="of microsoft/A-CLIP")
    parser.add_argument("--timm", type=Path, metavar="FOLDER", help="that holds timm 0.5.4")
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="where a trace of each cell's steps goes")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.release and not args.timm:
        parser.error("--release needs --timm FOLDER: pip install --no-deps --target FOLDER timm==0.5.4")
    args.out = args.out.absolute()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.cell:
        run_cell(args)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    go, late = args.out.with_suffix(".go"), time.monotonic() + args.patience
    go.unlink(missing_ok=True)
    waiting, running, failed = expanded(args), [], []
    while waiting or running:
        taken = sum(places_of(name) for name, process in running if not built_file(args.out, process.pid).exists())
        is_late = time.monotonic() > late
        if is_late and (waiting or not go.exists()):
            failed += waiting
            waiting = []
            for name, process in running:
                if not built_file(args.out, process.pid).exists():
                    print(f"{name}: not built in {args.patience:.0f} s", flush=True)
                    process.kill()
        if waiting and not running:
            go.unlink(missing_ok=True)
        move = WAIT
        if waiting and not go.exists():
            free_gib = torch.cuda.mem_get_info()[0] / GIB
            move = next_move(waiting[0], taken, len(running), free_gib, args.room)
        if move == MEASURE or not waiting and not taken or is_late:
            go.touch()
        if move == START:
            name = waiting.pop(0)
            here = args.baseline if name.startswith("base:") else Path.cwd()
            environment = os.environ | {"PYTHONPATH": f"{here.absolute()}:{os.environ.get('PYTHONPATH', '')}"}
            command = [sys.executable, "-P", str(Path(__file__).absolute()), *sys.argv[1:], "--cell", name]
            running.append((name, subprocess.Popen(command, env=environment)))
            continue
        for name, process in list(running):
            if process.poll() is not None:
                running.remove((name, process))
                built_file(args.out, process.pid).unlink(missing_ok=True)
                if process.returncode:
                    failed.append(name)
                    print(f"{name}: failed ({process.returncode})", flush=True)
        time.sleep(0.1)
    go.unlink(missing_ok=True)
    args.out.with_suffix(".lock").unlink(missing_ok=True)
    if args.out.is_file():
        show([json.loads(line) for line in args.out.read_text().splitlines()])
    print(f"failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
