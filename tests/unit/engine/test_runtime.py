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
        " runtime.stop(runtime.start());"
        " print(before, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-3:] == ["True", "False", "False"]
