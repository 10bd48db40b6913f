"""How fast are the links? Times collectives, and node against node, and names what is slow (part of the preflight)."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from amclip_ds.ranks.runtime import Runtime

MIB = 2**20
SLOW_SHARE = 0.5  # of the typical rate: below it, a pair of nodes is an outlier
MAX_ROUNDS = 15  # of node against node: enough partners to distinguish a slow node from a slow partner


def measure_collectives(runtime: Runtime) -> tuple[float, float]:
    """Bytes per second, in GB/s, of an all-reduce and an all-gather. Collective: every rank must call."""
    num_bytes = 64 * MIB if runtime.device.type == "cuda" else MIB
    tensor = torch.zeros(num_bytes // 4, device=runtime.device)
    gathered = list(torch.empty(runtime.world_size, tensor.numel(), device=runtime.device))
    reduce_s = _time(runtime.device, lambda: dist.all_reduce(tensor))
    gather_s = _time(runtime.device, lambda: dist.all_gather(gathered, tensor))
    return num_bytes / reduce_s / 1e9, num_bytes * runtime.world_size / gather_s / 1e9


def measure_pairs(runtime: Runtime, hosts: Sequence[str], group: dist.ProcessGroup) -> dict[tuple[str, str], float]:
    """GB/s between pairs of nodes, the first rank of each exchanging with that of the other; every node in one pair at
    a time. hosts: of every rank. Collective: every rank must call.
    """
    leaders = sorted({host: rank for rank, host in reversed(list(enumerate(hosts)))}.values())
    num_bytes = 16 * MIB if runtime.device.type == "cuda" else MIB
    out = torch.zeros(num_bytes // 4, device=runtime.device)
    into = torch.empty_like(out)
    found: dict[tuple[str, str], float] = {}
    for partners in tournament(leaders)[:MAX_ROUNDS]:
        dist.barrier(group=group)
        partner = partners.get(runtime.rank)
        if partner is None:
            continue
        seconds = _time(runtime.device, functools.partial(_exchange, out, into, partner))
        first, second = sorted((runtime.rank, partner))
        found[hosts[first], hosts[second]] = 2 * num_bytes / seconds / 1e9
    gathered: list[dict] = [{}] * runtime.world_size
    dist.all_gather_object(gathered, found, group=group)
    merged: dict[tuple[str, str], float] = {}
    for rates in gathered:
        for pair, rate in rates.items():
            merged[pair] = min(rate, merged.get(pair, rate))
    return merged


def tournament(players: Sequence[int]) -> list[dict[int, int]]:
    """Rounds in which everybody meets everybody once: each round maps a player to the partner (circle method)."""
    ring: list[int | None] = [*players, *([None] if len(players) % 2 else [])]
    rounds = []
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        pairs = [(a, b) for a, b in zip(ring[:half], reversed(ring[half:])) if a is not None and b is not None]
        rounds.append({a: b for a, b in pairs} | {b: a for a, b in pairs})
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return rounds


def name_outliers(pairs: dict[tuple[str, str], float]) -> list[str]:
    """Warnings about slow pairs. A node slow with every partner is the culprit: a good one has a fast partner."""
    if len(pairs) < 2:
        return []
    nodes = sorted({node for pair in pairs for node in pair})
    best = {node: max(rate for pair, rate in pairs.items() if node in pair) for node in nodes}
    typical = statistics.median(best.values())
    culprits = [node for node in nodes if best[node] < SLOW_SHARE * typical]
    lines = [
        f"{node} is slow with every node: at best {best[node]:.2f} GB/s, {typical:.2f} is typical here; if it stays,"
        f" sbatch --exclude={node}"
        for node in culprits
    ]
    for (a, b), rate in sorted(pairs.items()):
        if rate < SLOW_SHARE * typical and a not in culprits and b not in culprits:
            lines.append(f"{a} and {b} are slow with each other: {rate:.2f} GB/s, {typical:.2f} is typical here")
    return lines


def _exchange(out: torch.Tensor, into: torch.Tensor, partner: int) -> None:
    sends = [dist.P2POp(dist.isend, out, partner), dist.P2POp(dist.irecv, into, partner)]
    for request in dist.batch_isend_irecv(sends):
        request.wait()


def _time(device: torch.device, action: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest of `repeats` after a warm-up: noise only ever adds."""
    seconds = []
    for _ in range(repeats + 1):
        _synchronize(device)
        start = time.perf_counter()
        action()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
