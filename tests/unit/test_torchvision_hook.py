"""torchvision, timm and open_clip import in the environment as it is, whether amclip_ds was imported or not."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
HOOK = ROOT / "environment" / "amclip_ds_torchvision.py"
START = "import sys; sys.path.insert(0, {folder!r}); import amclip_ds_torchvision as hook; "


def python(script: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a folder where no amclip_ds is, with the hook of this tree."""
    command = [sys.executable, *flags, "-c", START.format(folder=str(HOOK.parent)) + script]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_torchvision_imports_without_amclip_ds(tmp_path: Path) -> None:
    done = python("import torchvision.transforms; print([n for n in sys.modules if 'amclip_ds.' in n])", tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_without_the_hook_it_does_not(tmp_path: Path) -> None:
    """The twin, where torchvision's wheel is a CUDA build beside a CPU-only torch."""
    script = "sys.meta_path.remove(hook.Finder); import torchvision"
    done = python(script, tmp_path)
    if done.returncode == 0:
        pytest.skip("torchvision's own operators load here")
    assert "torchvision::nms does not exist" in done.stderr


def test_a_healthy_torchvision_is_left_alone(tmp_path: Path) -> None:
    """Declared already, as a working library does: nothing is declared again."""
    declare = "import torch; own = torch.library.Library('torchvision', 'DEF'); "
    declare += "[own.define(schema) for schema in hook.SCHEMAS.values()]; "
    done = python(declare + "import torchvision; print(hook._kept_alive, hook.declare_missing())", tmp_path)
    assert done.stdout.strip() == "[] []", done.stderr


def test_it_costs_a_start_nothing(tmp_path: Path) -> None:
    done = python(
        "print([n for n in ('torch', 'numpy', 'amclip_ds') if n in sys.modules])", tmp_path, "-X", "importtime"
    )
    assert done.stdout.strip() == "[]"
    ours = [line.split("|") for line in done.stderr.splitlines() if line.endswith("amclip_ds_torchvision")]
    assert ours and int(ours[0][1]) < 20_000, "microseconds; 100 on an idle machine"
