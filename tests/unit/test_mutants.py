"""Each planted fault of benchmarks/mutants still applies to the code that it is planted in."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATCHES = sorted((ROOT / "benchmarks" / "mutants").glob("*.patch"))


def test_there_are_faults() -> None:
    assert len(PATCHES) >= 20


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_it_applies(patch: Path) -> None:
    done = subprocess.run(["git", "apply", "--check", patch], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words, said", [([], ""), (["--only", "no-such-fault"], " matches --only no-such-fault")])
def test_no_fault_is_no_success(words: list[str], said: str, tmp_path: Path) -> None:
    """Without the patches (a copy of the script alone), and with none that is asked for."""
    script = ROOT / "benchmarks" / "mutants.py"
    if not words:
        script = Path(shutil.copy(script, tmp_path))
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"no patch in {script.parent / 'mutants'}{said}" in done.stderr
