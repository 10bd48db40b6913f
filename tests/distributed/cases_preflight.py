"""Preflight on real ranks; each rank calls itself a node of its own where `nodes` is set."""

import os
import socket
import time
from pathlib import Path

import torch

from amclip_ds.ranks import bandwidth, preflight, runtime


def preflight_case(folder: str, shard: str, *, nodes: bool = False, other_config: bool = False, slow: int = -1) -> dict:
    """Runs the preflight. other_config: rank 1 has another one. slow: this rank's exchanges really take longer."""
    rank = int(os.environ["RANK"])
    if nodes:
        os.environ.update(
            GROUP_RANK=str(rank), GROUP_WORLD_SIZE=os.environ["WORLD_SIZE"], LOCAL_WORLD_SIZE="1", LOCAL_RANK="0"
        )
        socket.gethostname = lambda: f"node{rank}"  # type: ignore[method-assign]
    if rank == slow:
        exchange = bandwidth._exchange
        bandwidth._exchange = lambda *words: (time.sleep(0.5), exchange(*words))  # type: ignore[assignment]
    started = runtime.start(60)
    lines: list[str] = []
    config_text = f"seed: {int(other_config and rank == 1)}"
    try:
        report = preflight.preflight(
            started, config_text=config_text, shards=[shard], folder=Path(folder), say=lines.append
        )
    finally:
        runtime.stop(started)
    assert torch.distributed.is_initialized() is False
    return {
        "lines": lines,
        "warnings": report.warnings,
        "pairs": report.pair_gb_per_s,
        "rate": report.all_reduce_gb_per_s,
    }
