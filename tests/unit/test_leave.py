"""A process that is done ends with its command's code, after atexit's functions, and is not taken down by module."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
from amclip_ds import __main__, cli

class Module:
    def __del__(self):
        print("taken down")

held = Module()

def command():
    atexit.register(print, "at exit")
    print("done", end=" ")
    {ending}

cli.main = command
sys.exit(__main__.main())
"""


@pytest.mark.parametrize(
    ("ending", "code", "printed"),
    [("return 75", 75, "done at exit\n"), ("sys.exit(2)", 2, "done at exit\ntaken down\n")],
    ids=["a code", "none: as Python ends"],
)
def test_a_command_with_a_code_is_not_taken_down(ending: str, code: int, printed: str) -> None:
    program = PROGRAM.format(ending=ending)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, printed, "")
