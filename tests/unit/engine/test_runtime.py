"""What a rank sets for its process."""

import os
import subprocess
import sys

STEPS = """
import resource
import numpy as np
from amclip_ds.ranks import runtime
if {keeps}:
    runtime.keep_freed_memory()
def step():
    for _ in range(4):
        np.ones(1 << 23)  # 64 MiB: 16,384 pages
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(keeps: bool) -> int:
    """How many pages a second step asks of the system."""
    words = [sys.executable, "-c", STEPS.format(keeps=keeps)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return int(subprocess.run(words, capture_output=True, text=True, check=True, env=env).stdout)


def test_freed_memory_is_kept_for_the_next_step() -> None:
    assert new_pages(keeps=True) < 100 < 1000 < new_pages(keeps=False)


def test_a_run_in_fp32_rounds_no_product_to_tf32() -> None:
    """A patch embedding as a convolution would else part from the same as a matrix product (savings.patchify)."""
    program = (
        "import torch; from amclip_ds.ranks import runtime; before = torch.backends.cudnn.allow_tf32;"
        " runtime.start();"
        " print(before, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-3:] == ["True", "False", "False"]


PROGRAM = """
import os, sys
import torch
from amclip_ds.ranks import runtime

def program():
    kept = torch.backends.cudnn
    asked = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    rounds = kept.conv.fp32_precision, kept.rnn.fp32_precision
    rounds += (kept.allow_tf32,) if rounds[0] == rounds[1] else ()  # it raises where they are apart
    of_torch = asked, rounds, torch.distributed.is_initialized()
    names = (*runtime.MEETING, "CUBLAS_WORKSPACE_CONFIG")
    return {name: os.environ.get(name) for name in names}, of_torch, sys.excepthook

meet = runtime._meet
def at_once(*words):
    raise KeyboardInterrupt
def in_torch(*words):
    os.environ["MASTER_PORT"] = str(runtime.free_port())
    torch.distributed.init_process_group("gloo")
    raise KeyboardInterrupt
def at_the_end(*words):
    meet(*words)
    raise KeyboardInterrupt

before = program()
for cut in (at_once, in_torch, at_the_end):
    runtime._meet = cut
    try:
        runtime.start(deterministic=True)
    except KeyboardInterrupt:
        assert program() == before, (cut, program(), before)
runtime._meet = meet
for _ in range(2):
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    before = program()
    started = runtime.start(deterministic=True)
    during = program()
    assert during[0]["RANK"] == "0" and during[0]["CUBLAS_WORKSPACE_CONFIG"] and during[1][0] == (True, False), during
    assert torch.backends.cudnn.allow_tf32 is False and during[1][-1]
    runtime.stop(started)
    assert program() == before, (program(), before)
print("as before")
"""


def test_a_start_that_is_cut_short_and_a_stop_leave_the_program_as_it_was() -> None:
    """Ctrl-C in a notebook: what was left of a start kept every later one from beginning."""
    env = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=env)
    assert done.stdout.endswith("as before\n"), done.stderr
