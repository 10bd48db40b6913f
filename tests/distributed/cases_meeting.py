"""The meeting of a process that is alone: it draws its own port, which another process may have taken meanwhile."""

import os
import socket

import torch

from amclip_ds.checkpoint.ranks import Ranks
from amclip_ds.errors import UserError
from amclip_ds.ranks import preflight, runtime


def meeting_case(taken_draws: int) -> int:
    """Meets while the first `taken_draws` ports that are drawn are taken. Returns the number of draws."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    draws = 0
    draw = runtime.free_port
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()

        def drawn() -> int:
            nonlocal draws
            draws += 1
            return taken.getsockname()[1] if draws <= taken_draws else draw()

        runtime.free_port = drawn
        started = runtime.start(30)
        torch.distributed.all_reduce(torch.ones(1))
        runtime.stop(started)
    return draws


def gpus_case(gpus: list[str]) -> str:
    """Meets with a GPU each, known by these names. Returns what was said against that."""
    runtime._identity = lambda device: gpus[int(os.environ["RANK"])]  # type: ignore[assignment]
    try:
        started = runtime.start(30)
    except UserError as error:
        assert error.is_shared, "else every rank would print it"
        return str(error)
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    runtime.stop(started)
    assert total.item() == len(gpus)
    return ""


def no_interface_case() -> list[str]:
    """What the groups of a node say whose interface gloo does not find, though the ranks have met."""
    started = runtime.start(30)
    os.environ["GLOO_SOCKET_IFNAME"] = "nosuch0"
    said = []
    for group in (Ranks, preflight._meet):
        try:
            group()
        except runtime.AmclipError as error:
            said.append(str(error))
    runtime.stop(started)
    return said
