"""What the steps of a run spend their time on: a trace and a page, RUN/profile, where run.profile asks for it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amclip_ds.files import write_atomically

WAIT, WARM = 5, 1  # steps before the first that counts: allocations, autotuning, the compiler
LARGEST = 5
KINDS = (  # kind, names of operators and kernels that belong to it, what to change
    (
        "communication",
        r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|broadcast|Send|Recv",
        "more samples a rank (batch.per_gpu up to batch.global_size / ranks), a lower ZeRO stage, fewer nodes",
    ),
    ("attention", r"scaled_dot|flash|fmha|attention|softmax", "bf16 (ds_configs/*_bf16.json); mask.keep_ratio"),
    (
        "matrix products",
        r"\bmm\b|addmm|bmm|baddbmm|linear|matmul|gemm|cutlass|cublas|nvjet|convolution|conv2d",
        "this is the work itself: bf16 where it is fp32, more samples at a time (batch.per_gpu)",
    ),
    (
        "optimizer",
        r"adam|sgd|lion|lamb|_foreach|multi_tensor|fused_",
        "more samples a step spread its cost; ZeRO 1 or 2 share it among ranks",
    ),
    (
        "copies",
        r"copy|memcpy|memset|\bcat\b|clone|contiguous|index|gather|scatter|\bto\b|_to_|fill|zero",
        "engine.compile=tower fuses many; engine.savings.* on; offload off",
    ),
    (
        "elementwise and norms",
        r"norm|gelu|relu|sigmoid|add|mul|sub|div|sum|mean|exp|log|clamp|where|elementwise|reduce"
        r"|triton|vectorized",
        "engine.compile=tower fuses them",
    ),
)
OTHER = ("other", "see the trace")


@dataclass(frozen=True)
class Cost:
    """A kind of work in the profiled steps."""

    kind: str
    seconds: float
    """a step"""
    calls: float
    """a step"""
    advice: str


def kind_of(name: str) -> tuple[str, str]:
    """The kind of an operator or kernel, and what changes its cost."""
    return next(((kind, advice) for kind, names, advice in KINDS if re.search(names, name, re.I)), OTHER)


def costs_of(operators: Iterable[tuple[str, float, int]], steps: int) -> list[Cost]:
    """(name, seconds, calls) of each operator -> the kinds, the dearest first."""
    found: dict[str, Cost] = {}
    for name, seconds, calls in operators:
        kind, advice = kind_of(name)
        before = found.get(kind, Cost(kind, 0.0, 0.0, advice))
        found[kind] = Cost(kind, before.seconds + seconds / steps, before.calls + calls / steps, advice)
    return sorted(found.values(), key=lambda cost: -cost.seconds)


def page_of(operators: list[tuple[str, float, int]], steps: int, wall_s: float, device: str) -> str:
    """The summary as text: the largest costs with what to change, and the dearest operators."""
    costs = costs_of(operators, steps)
    busy = sum(cost.seconds for cost in costs)
    lines = [
        f"{steps} steps of {wall_s / steps * 1e3:.1f} ms; of it {device} worked {busy * 1e3:.1f} ms",
        "",
        f"{'the largest costs of a step':28} {'ms':>9} {'share':>6} {'calls':>7}  what changes it",
    ]
    for cost in costs[:LARGEST]:
        share = cost.seconds / busy if busy else 0.0
        lines.append(f"{cost.kind:28} {cost.seconds * 1e3:9.2f} {share:6.1%} {cost.calls:7.0f}  {cost.advice}")
    idle = wall_s / steps - busy
    if idle > 0.1 * wall_s / steps:
        lines.append(f"{'waiting (data, host, ranks)':28} {idle * 1e3:9.2f} {'':6} {'':7}  the log line says for what")
    lines += ["", f"{'the dearest operators':60} {'ms':>9} {'calls':>7}"]
    for name, seconds, calls in sorted(operators, key=lambda row: -row[1])[:15]:
        lines.append(f"{name[:60]:60} {seconds / steps * 1e3:9.2f} {calls / steps:7.0f}")
    return "\n".join([*lines, "", "trace.json.gz: open it at https://ui.perfetto.dev or chrome://tracing", ""])


def operators_of(averages: Iterable[Any], on_gpu: bool) -> list[tuple[str, float, int]]:
    """(name, seconds, calls) of what worked in torch's averages of a profile: a CPU's operators, or a GPU's kernels and
    copies. The operators that started a kernel have its time too, and annotations on the device span kernels: left out.
    """
    if not on_gpu:
        worked = [(event.key, event.self_cpu_time_total, event.count) for event in averages]
        return [(name, us / 1e6, count) for name, us, count in worked if not name.startswith("ProfilerStep")]
    return [
        (event.key, event.self_device_time_total / 1e6, event.count)
        for event in averages
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]


class Profile:
    """Watches some steps of rank 0; elsewhere, and where steps is None, it does nothing.

    say: reports where the summary is. Call `step` after each step.
    """

    def __init__(self, folder: Path, steps: int | None, is_main: bool, say: Any, on_gpu: bool) -> None:
        self._folder, self._steps, self._say, self._on_gpu = folder / "profile", steps, say, on_gpu
        self._seen = 0
        self._is_wanted = bool(steps) and is_main
        self._torch: Any = None

    def step(self) -> None:
        if not self._is_wanted:
            return
        self._seen += 1
        if self._seen == WAIT:
            self._begin()
        elif self._torch is not None:
            self._torch.step()

    def _begin(self) -> None:
        from torch.profiler import ProfilerActivity, profile, schedule

        gpu = [ProfilerActivity.CUDA] if self._on_gpu else []
        assert self._steps is not None
        self._torch = profile(
            activities=[ProfilerActivity.CPU, *gpu],
            on_trace_ready=self._write,
            schedule=schedule(wait=0, warmup=WARM, active=self._steps, repeat=1),
        )
        self._torch.start()

    def _write(self, seen: Any) -> None:
        """The files. What the disk does not take is said, and ends nothing."""
        self._is_wanted, steps = False, self._steps or 1
        operators = operators_of(seen.key_averages(), self._on_gpu)
        walls = [event.cpu_time_total for event in seen.events() if event.name.startswith("ProfilerStep")]
        page = page_of(operators, steps, sum(walls) / 1e6, "the GPU" if self._on_gpu else "the CPU")
        try:
            self._folder.mkdir(exist_ok=True)
            seen.export_chrome_trace(str(self._folder / "trace.json.gz"))
            write_atomically(self._folder / "summary.txt", page)
        except (OSError, RuntimeError) as error:
            self._say(f"run.profile: not written: {error}; training continues")
            return
        self._say(f"profile of {steps} steps: {self._folder}/summary.txt, trace.json.gz\n{page.split(chr(10) * 2)[1]}")

    def close(self) -> None:
        """Ends a profile that the run's end cut short; nothing is written."""
        if self._torch is not None and self._is_wanted:
            self._is_wanted = False
            self._say("run.profile: the run ended before its steps were seen; nothing is written")
