"""The wheel carries what the package reads beside its code, and finds it once installed."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


HOOK = {"amclip_ds_torchvision.pth", "amclip_ds_torchvision.py"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: a build leaves folders behind in its tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tree / name)
    for folder in ("amclip_ds", "ds_configs", "environment"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(out)]
    subprocess.run(command, cwd=tree, check=True, timeout=300)
    return next(out.glob("*.whl"))


def test_the_wheel_carries_recipes_and_ds_configs(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern in (("amclip_ds/recipes", "*/*.yaml"), ("ds_configs", "*.json"), ("ds_configs", "README.md")):
        files = list((ROOT / folder).glob(pattern))
        assert files
        for file in files:
            name = file.relative_to(ROOT).as_posix()
            assert (name if name.startswith("amclip_ds/") else f"amclip_ds/{name}") in inside, name


def test_both_kinds_of_install_place_the_torchvision_hook(wheel: Path, tree: Path, tmp_path: Path) -> None:
    """A .pth file and its module, at the top of what is installed: of a wheel and of `pip install -e`."""
    script = f"from setuptools import build_meta; print(build_meta.build_editable({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", script], cwd=tree, check=True, timeout=300, capture_output=True)
    for built in (wheel, *tmp_path.glob("*.whl")):
        assert set(zipfile.ZipFile(built).namelist()) >= HOOK, built


def test_an_installed_wheel_finds_its_ds_configs(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = (
        "import amclip_ds; from amclip_ds.engine.student import EngineConfig, read_ds_config;"
        "print(amclip_ds.__file__, read_ds_config(EngineConfig('zero3_bf16.json'))['zero_optimization']['stage'])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {script}"], cwd=tmp_path,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.split() == [str(tmp_path / "amclip_ds" / "__init__.py"), "3"], done.stderr
