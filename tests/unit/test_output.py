"""Standard output closed, full, or a pipe that nobody reads: the work continues, or one line and a code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.unit.data.shards import write_shards

AMCLIP = f"{sys.executable} -m amclip_ds"
FULL = "standard output cannot be written: No space left on device"


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """What a user types; the exit status is the first command's."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
    )


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("recipes >&-", 0, ""),
        ("recipes >&- 2>&-", 0, ""),
        ("recipes >/dev/full", 1, f"amclip recipes: {FULL}\n"),
        ("recipes >/dev/full 2>/dev/full", 1, ""),
        ("recipes | true", 0, ""),
        ("recipes aclip-tiny | head -n 1 >/dev/null", 0, ""),
        ("--help >/dev/full", 1, f"amclip --help: {FULL}\n"),
        ("recipes nothing-like-it 2>&-", 2, ""),
        ("recipes <&- >/dev/null", 0, ""),
    ],
)
def test_a_command_outlasts_its_output(line: str, code: int, said: str) -> None:
    done = shell(f"{AMCLIP} {line}")
    assert (done.returncode, done.stderr) == (code, said)


def test_a_check_with_closed_output_writes_its_report(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", (20,))
    done = shell(f"{AMCLIP} data check {tmp_path / 'data'} --json {tmp_path / 'report.json'} >&- 2>&-")
    assert done.returncode == 0 and (tmp_path / "report.json").stat().st_size > 100


def test_a_closed_descriptor_is_no_other_files(tmp_path: Path) -> None:
    """Without the null device in its place, the first file that is opened gets number 1, and the prints."""
    program = (
        "import os, sys\n"
        "from amclip_ds.output import make_steady\n"
        "make_steady()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "os.write(1, b'from a library')\n"
        "print('a line')\n"
        "sys.exit(0 if file.fileno() > 2 else 1)\n"
    )
    (tmp_path / "program.py").write_text(program)
    assert shell(f"{sys.executable} {tmp_path / 'program.py'} >&- <&-").returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_the_end_of_the_terminal_is_heeded_but_not_under_nohup() -> None:
    program = (
        "import signal, sys, time\n"
        "from amclip_ds.resilience.preemption import listen\n"
        "arrivals = listen()\n"
        "print('up', flush=True)\n"
        "for _ in range(int(sys.argv[1])):\n"
        "    time.sleep(0.05)\n"
        "    if arrivals.first: break\n"
        "print(arrivals.first)\n"
    )
    for prefix, heard, turns in (([], "SIGHUP", "1000"), (["nohup"], "None", "40")):
        process = subprocess.Popen(
            [*prefix, sys.executable, "-c", program, turns],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout and process.stdout.readline() == "up\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGHUP)
        assert process.communicate(timeout=60)[0] == f"{heard}\n"
