"""Is every node fit for the run? Checks of a few seconds before the first step; a bad node is named.

Each rank gathers its Facts; `judge` (pure, the same on every rank) turns them into mistakes that stop the run and
warnings that do not. Then the collectives are timed, and node against node, so that a slow link or node shows.
"""

import hashlib
import os
import platform
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from amclip_ds.errors import AmclipError, UserError, in_one_line
from amclip_ds.files import OF_THE_MACHINE, describe, open_regular
from amclip_ds.ranks.bandwidth import measure_collectives, measure_pairs, name_outliers
from amclip_ds.ranks.collectives import cpu_group
from amclip_ds.ranks.runtime import Runtime
from amclip_ds.shards.sources import is_remote

ANSWER_TIMEOUT_S = 120.0  # every rank must show up within this; imports on a cold file system take most of it
CLOCK_SKEW_S = 2.0
USED_GPU_SHARE = 0.1
SAMPLED_SHARDS = 16
PACKAGE = Path(__file__).resolve().parents[1]
MIB = 2**20
MUST_AGREE = {
    "code": "install the same checkout everywhere",
    "config": "start every rank with the same arguments",
    "versions": "one environment for all nodes",
}


@dataclass(frozen=True)
class Facts:
    """What one rank found out about its place."""

    rank: int
    host: str
    code: str
    config: str
    versions: str
    clock_s: float
    gpu_free: int = 0
    gpu_total: int = 0
    disk_error: str = ""
    shard_error: str = ""
    """Of the first of the sampled shards that cannot be read here."""
    is_in_trouble: bool = False
    """Whether one of the two is the file system's trouble, and no mistake of the user's."""


@dataclass
class Judgement:
    """What the facts of all ranks mean."""

    mistakes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """of a node or its file systems"""
    warnings: list[str] = field(default_factory=list)


@dataclass
class PreflightReport:
    """What the preflight found, for the log."""

    seconds: float
    warnings: list[str]
    all_reduce_gb_per_s: float
    all_gather_gb_per_s: float
    pair_gb_per_s: dict[str, float]

    def lines(self) -> list[str]:
        """The report in words, one line each."""
        rates = f"all-reduce {self.all_reduce_gb_per_s:.2f} GB/s, all-gather {self.all_gather_gb_per_s:.2f} GB/s"
        pairs = self.pair_gb_per_s.values()
        if pairs:
            rates += f", node to node {min(pairs):.2f} to {max(pairs):.2f} GB/s"
        return [
            f"preflight: {rates} ({self.seconds:.1f} s)",
            *(f"preflight: warning: {line}" for line in self.warnings),
        ]


def preflight(
    runtime: Runtime, *, config_text: str, shards: Sequence[str], folder: Path, say: Callable[[str], None]
) -> PreflightReport:
    """Checks every node and says what it found. Collective: every rank must call.

    config_text: the resolved settings. shards: the training shards, a sample of which is read from every node.
    folder: the run's folder, where every node must be able to write. Raises UserError, the same on every rank, for
    mistakes, AmclipError for nodes that are not fit and for ranks that do not answer.
    """
    start = time.monotonic()
    group = _meet()
    facts = gather_facts(runtime, config_text, shards, folder, group)
    verdict = judge(facts)
    if verdict.mistakes or verdict.faults:
        ending = (UserError if verdict.mistakes else AmclipError)(
            "preflight: " + "; ".join(verdict.mistakes + verdict.faults)
        )
        ending.is_shared = True
        raise ending
    hosts = [fact.host for fact in facts]
    reduce_rate, gather_rate = measure_collectives(runtime)  # first: NCCL wants all ranks in a group's first call
    pairs = measure_pairs(runtime, hosts, group) if runtime.num_nodes > 1 else {}
    warnings = verdict.warnings + name_outliers(pairs)
    report = PreflightReport(
        seconds=round(time.monotonic() - start, 2),
        warnings=warnings,
        all_reduce_gb_per_s=reduce_rate,
        all_gather_gb_per_s=gather_rate,
        pair_gb_per_s={f"{a} {b}": rate for (a, b), rate in pairs.items()},
    )
    for line in report.lines():
        say(line)
    return report


def gather_facts(
    runtime: Runtime, config_text: str, shards: Sequence[str], folder: Path, group: dist.ProcessGroup
) -> list[Facts]:
    """Every rank's facts, in rank order. Collective: every rank must call."""
    probes = runtime.local_rank == 0  # one probe a node: a thousand ranks would storm the file system's metadata
    disk_error, disk_fails = write_probe(folder, runtime.rank) if probes else ("", False)
    shard_error, shard_fails = read_probe(shards) if probes else ("", False)
    own = asdict(
        Facts(
            rank=runtime.rank,
            host=socket.gethostname(),
            code=code_hash(),
            config=_hash(config_text.encode()),
            versions=f"python {platform.python_version()}, torch {torch.__version__}",
            clock_s=0.0,
            disk_error=disk_error,
            shard_error=shard_error,
            is_in_trouble=disk_fails or shard_fails,
            **_gpu_facts(runtime.device),
        )
    )
    dist.barrier(group=group)
    own["clock_s"] = time.time()  # right after the barrier, so that the clocks can be compared
    gathered: list[dict] = [{}] * runtime.world_size
    dist.all_gather_object(gathered, own, group=group)
    return [Facts(**fact) for fact in gathered]


def judge(facts: Sequence[Facts]) -> Judgement:
    """The same verdict on every rank. Raises nothing."""
    verdict = Judgement()
    for name, hint in MUST_AGREE.items():
        odd, usual = _odd_ones(facts, name)
        if odd:
            found = f"{name} of {_nodes(odd)} is {getattr(odd[0], name)}, elsewhere {usual}"
            verdict.mistakes.append(f"{found}; {hint}{_exclude(odd, facts)}")
    for key, name in (("run.out", "disk_error"), ("data.train", "shard_error")):
        bad = [fact for fact in facts if getattr(fact, name)]
        if bad:
            exclude = _exclude(bad, facts)
            # What other nodes can do is right: this one lacks a mount, or its file system is in trouble.
            is_fault = bool(exclude) or any(fact.is_in_trouble for fact in bad)
            kind = verdict.faults if is_fault else verdict.mistakes
            kind.append(f"{key}: {getattr(bad[0], name)} on {_nodes(bad)}{exclude}")
    verdict.warnings += _busy_gpus(facts) + _wrong_clocks(facts)
    return verdict


def code_hash(package: Path = PACKAGE) -> str:
    """A hash of every source file of a package: the same code on every node."""
    files = sorted(path for path in package.rglob("*") if path.suffix in (".py", ".yaml", ".json"))
    return _hash(b"\0".join(str(path.relative_to(package)).encode() + path.read_bytes() for path in files))


def write_probe(folder: Path, rank: int) -> tuple[str, bool]:
    """Writes, syncs and removes a small file in the folder. Returns the mistake in words, empty if it went well, and
    whether it is the machine's."""
    probe = folder / f".preflight-{rank}"
    try:
        with probe.open("wb") as file:
            file.write(os.urandom(MIB))
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
        return "", False
    except OSError as error:
        return f"cannot write in {folder}: {error.strerror}", error.errno in OF_THE_MACHINE


def read_probe(shards: Sequence[str]) -> tuple[str, bool]:
    """Opens an even sample of the shards; pipes and addresses are not checked. Returns as `write_probe` does. It waits
    for nothing: the other ranks wait for this one."""
    files = [shard for shard in shards if not is_remote(shard)]
    step = max(1, len(files) // SAMPLED_SHARDS)
    for shard in files[::step]:
        try:
            open_regular(Path(shard)).close()
        except OSError as error:
            return f"{shard} cannot be read ({describe(error)})", error.errno in OF_THE_MACHINE
    return "", False


def _meet() -> dist.ProcessGroup:
    """A gloo group for objects, after every rank has shown up. Collective. Raises AmclipError naming who did not."""
    group = cpu_group(ANSWER_TIMEOUT_S)
    try:
        dist.monitored_barrier(group=group, wait_all_ranks=True)
    except RuntimeError as error:
        text = in_one_line(error)
        raise AmclipError(f"preflight: ranks do not answer within {ANSWER_TIMEOUT_S:.0f} s: {text}") from None
    return group


def _gpu_facts(device: torch.device) -> dict:
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {"gpu_free": free, "gpu_total": total}


def _odd_ones(facts: Sequence[Facts], name: str) -> tuple[list[Facts], str]:
    """The ranks whose value differs from the most frequent one (of rank 0 in a tie), and that one."""
    values = [getattr(fact, name) for fact in facts]
    usual = max(values, key=lambda value: (values.count(value), value == values[0]))
    return [fact for fact, value in zip(facts, values) if value != usual], usual


def _busy_gpus(facts: Sequence[Facts]) -> list[str]:
    lines = []
    for fact in facts:
        used = fact.gpu_total - fact.gpu_free
        if used > USED_GPU_SHARE * fact.gpu_total:
            lines.append(
                f"GPU of rank {fact.rank} on {fact.host}: {used / 1e9:.1f} of {fact.gpu_total / 1e9:.0f} GB are taken"
                f" already; another process? (nvidia-smi there, or sbatch --exclude={fact.host})"
            )
    return lines


def _wrong_clocks(facts: Sequence[Facts]) -> list[str]:
    skews = {fact.host: fact.clock_s - facts[0].clock_s for fact in reversed(facts)}
    return [
        f"the clock of {host} is {skew:+.1f} s off that of {facts[0].host}: heartbeats are compared across nodes"
        for host, skew in skews.items()
        if abs(skew) > CLOCK_SKEW_S
    ]


def _nodes(facts: Sequence[Facts]) -> str:
    """'node2 (ranks 2, 3)' and so on."""
    ranks: dict[str, list[str]] = {}
    for fact in facts:
        ranks.setdefault(fact.host, []).append(str(fact.rank))
    return ", ".join(f"{host} (rank {', '.join(numbers)})" for host, numbers in ranks.items())


def _exclude(bad: Sequence[Facts], facts: Sequence[Facts]) -> str:
    """Suggests to leave the bad nodes out, if any other would remain."""
    hosts = sorted({fact.host for fact in bad})
    return f"; or sbatch --exclude={','.join(hosts)}" if len(hosts) < len({fact.host for fact in facts}) else ""


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
