"""The container definitions and site files, as far as they can be checked without building: sources, pins, syntax."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "containers" / "Dockerfile").read_text()
DEFINITION = (ROOT / "containers" / "amclip.def").read_text()


def section(name: str) -> str:
    """One section of the Apptainer definition."""
    found = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", DEFINITION, re.MULTILINE | re.DOTALL)
    assert found, name
    return found.group(1)


def test_both_take_the_same_files_and_all_are_there() -> None:
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()}
    listed = {line.split()[0] for line in section("files").splitlines() if line.strip()}
    assert copied == listed and all((ROOT / name).exists() for name in copied)
    manifest = {"amclip_ds", "benchmarks", "ds_configs", "environment", "slurm", "pyproject.toml", "setup.py"}
    assert copied >= manifest


def test_both_are_pinned_alike() -> None:
    images = re.findall(r"^(?:FROM|From:) (\S+)$", DOCKERFILE + DEFINITION, re.MULTILINE)
    assert len(images) == 2 and images[0] == images[1]
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu\d+\.\d+", images[0])
    installs = [re.findall(r"pip install (.+?)(?: &&|$)", text, re.MULTILINE) for text in (DOCKERFILE, section("post"))]
    assert installs[0] == installs[1] == ["'.[gpu,fp8,onnx,data,track]' -c constraints.txt"]
    system = re.findall(
        r"apt-get install -y --no-install-recommends (.+?)\s*\\?$", DOCKERFILE + DEFINITION, re.MULTILINE
    )
    assert len(system) == 2 and system[0] == system[1]


def test_what_is_shell_in_them_parses() -> None:
    for name in ("post", "environment", "test", "runscript"):
        assert subprocess.run(["bash", "-n"], input=section(name), text=True).returncode == 0, name
    for line in re.findall(r"^RUN ((?:.*\\\n)*.*)$", DOCKERFILE, re.MULTILINE):
        assert subprocess.run(["bash", "-n"], input=line, text=True).returncode == 0, line


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(["hadolint", str(ROOT / "containers" / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_conda_recipe_and_site_files() -> None:
    recipe = yaml.safe_load((ROOT / "containers" / "environment.yml").read_text())
    assert recipe["name"] == "amclip" and "python=3.11" in recipe["dependencies"]
    sites = sorted((ROOT / "slurm" / "sites").glob("*.env"))
    assert {path.stem for path in sites} >= {"example", "gpu-venv", "gpu-apptainer", "gpu-pyxis"}
    for path in sites:
        stubs = "module() { :; }; set -eu; HOME=/home/me;"
        shown = 'echo "${AMCLIP_VENV:-}${AMCLIP_PYTHON:-}"'
        done = subprocess.run(["bash", "-c", f"{stubs} . {path}; {shown}"], capture_output=True, text=True)
        assert done.returncode == 0 and (done.stdout.strip() or path.stem == "example"), (path, done.stderr)
