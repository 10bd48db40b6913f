"""The meeting of a process that is alone: it draws its own port, which another process may have taken meanwhile."""

import os
import socket

import torch

from amclip_ds.ranks import runtime


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
