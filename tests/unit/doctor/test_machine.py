"""`amclip doctor` on machines that lack something: each is named, with its fix, and nothing else breaks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from amclip_ds.doctor import FAIL, OK, WARN, Finding, findings, machine
from amclip_ds.ranks.launcher_env import NEEDED


def one(name: str, folder: Path = Path("/tmp")) -> Finding:
    """The worst of a check's findings."""
    found = list(findings({name: machine.checks(folder)[name]}))
    return max(found, key=lambda finding: (OK, WARN, FAIL).index(finding.status))


def test_a_half_set_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    found = one("launcher")
    assert found.status == FAIL and "WORLD_SIZE" in found.found and "unset RANK" in found.fix


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert one("compiler").status == OK
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = one("compiler")
    assert found.status == WARN and "no C++ compiler" in found.found and "g++" in found.fix


def test_a_compiler_that_compiles_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho cannot execute cc1plus >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert "compiles nothing: cannot execute cc1plus" in one("compiler").found


def test_a_disk_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "FREE_GB", (0.0, 0.0))
    monkeypatch.setattr(machine, "SLOW_DISK", 0.0)
    assert one("disk", tmp_path).status == OK
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(machine, "FREE_GB", (1e9, 1e9))
    assert one("disk", tmp_path).status == FAIL
    (tmp_path / "file").touch()
    assert one("disk", tmp_path / "file").status == FAIL
    if Path("/proc/self/task").is_dir():
        assert one("disk", Path("/proc/1")).status == FAIL


def test_a_write_that_fails(tmp_path: Path) -> None:
    code = f"""
import resource, signal
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # as a quota that is used up
from amclip_ds.doctor import findings, machine
machine.FREE_GB = (0.0, 0.0)
print([f.status + " " + f.found for f in findings({{"disk": machine.checks(Path({str(tmp_path)!r}))["disk"]}})])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fail" in done.stdout and "cannot be written" in done.stdout


def test_few_open_files() -> None:
    code = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from pathlib import Path
from amclip_ds.doctor import findings, machine
print([f.status + " " + f.fix for f in findings({"limits": machine.checks(Path("."))["limits"]})])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fail ulimit -n 256" in done.stdout


def test_a_wrong_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert one("clock", tmp_path).status == OK
    real = time.time
    now = real()
    monkeypatch.setattr(time, "time", lambda: 946684800.0)
    assert one("clock", tmp_path).status == FAIL and "2000-01-01" in one("clock", tmp_path).found
    monkeypatch.setattr(time, "time", lambda: now + 30 * 365 * 86400)
    assert one("clock", tmp_path).status == FAIL
    now = real()
    monkeypatch.setattr(time, "time", lambda: now + 3650)
    assert one("clock", tmp_path).status == WARN and "server is -36" in one("clock", tmp_path).found


def test_a_tiny_dev_shm(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs("/dev/shm")
    monkeypatch.setattr(
        os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 16384, 16000, 16000, *tuple(real)[5:]))
    )
    found = one("shared memory")
    assert found.status == WARN and "62 MiB free" in found.found and "--shm-size" in found.fix


def test_a_package_that_is_missing_or_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "simplejpeg.py").write_text("raise ImportError('undefined symbol: jpeg_resync')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    found = one("operators")
    assert (
        found.status == FAIL
        and "simplejpeg (JPEG decoding) does not load: ImportError: undefined symbol" in found.found
    )


def test_a_check_that_breaks_is_a_finding() -> None:
    def breaks() -> list[Finding]:
        raise RuntimeError("driver gone")

    found = list(findings({"torch": breaks, "python": machine.checks(Path("."))["python"]}))
    assert [(one.name, one.status) for one in found] == [("torch", FAIL), ("python", OK)]
    assert "driver gone" in found[0].found


def test_the_collective_of_two_processes() -> None:
    assert one("collective").status == OK


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from amclip_ds.cli import main

    monkeypatch.setattr(machine, "checks", lambda folder: {"python": machine._python, "launcher": machine._launcher})
    for name in NEEDED:  # what another test's meeting left
        monkeypatch.delenv(name, raising=False)
    assert main(["doctor", "--json", str(tmp_path / "found.json")]) == 0
    monkeypatch.setenv("RANK", "0")
    assert main(["doctor", "--json", str(tmp_path / "found.json")]) == 2
    found = json.loads((tmp_path / "found.json").read_text())["findings"]
    assert {row["name"]: row["status"] for row in found} == {"python": OK, "launcher": FAIL}
    assert "fail  launcher: " in capsys.readouterr().out
    assert main(["doctor", str(tmp_path)]) == 2
    assert "not a run's folder" in capsys.readouterr().err


def test_what_engine_fp8_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda name: "0.18.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "NVIDIA A100 has no fp8 units" in machine._fp8("NVIDIA A100").found
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "engine.fp8=teacher or all" in machine._fp8("NVIDIA H100").found
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'amclip_ds[fp8]'" in machine._fp8("NVIDIA H100").found
