"""One run through full disks, a broken evaluation set, a lost folder, killed processes, a closed output, SIGHUP."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("steps", [40, pytest.param(200, marks=pytest.mark.nightly)])
def test_a_run_goes_through_everything(steps: int, scenes: Path, tmp_path: Path) -> None:
    """It stops once, as documented, and its losses and samples are the undisturbed run's, bit for bit."""
    argv = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=900m none "$0" && exec "$@"', str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run([*argv, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    command = [*argv, sys.executable, "-m", "tests.e2e.ordeal", str(scenes), str(tmp_path), str(steps)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    calm, ordeal, part = found["calm"], found["ordeal"], steps // 20
    assert found["codes"] == [0, 75, 0], done.stderr
    assert calm["steps"] == ordeal["steps"] == list(range(1, steps + 1))
    assert calm["losses"] == ordeal["losses"] and calm["ids"] == ordeal["ids"]

    due = set(range(2 * part, steps + 1, 2 * part)) - {4 * part, 14 * part}  # at those two the disk was full
    others = set(ordeal["committed"]) - due
    assert due <= set(ordeal["committed"]) and all(15 * part <= step < 17 * part for step in others)  # SIGHUP's
    assert ordeal["verdict"]["code"] == 0 and ordeal["verdict"]["step"] == steps
    assert ordeal["evaluated"] == [4 * part, 12 * part, 16 * part, steps]
    kinds = {kind for kind, *_ in ordeal["incidents"]}
    assert {"record_held", "checkpoint_failed", "evaluation_failed", "worker_died"} <= kinds
    held = [action for kind, _, _, action in ordeal["incidents"] if kind == "record_held"]
    assert len(held) >= 2 and all("nothing is lost" in action for action in held)
    assert {"student.safetensors", "tensorboard"} <= set(ordeal["files"])
