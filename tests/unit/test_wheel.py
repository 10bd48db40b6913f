"""The wheel carries what the package reads beside its code, and works from any folder once installed."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import amclip_ds
from tests.unit.evaluate.exports import write_run
from tests.unit.evaluate.test_encoder import picture

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


LOADED_FROM_ITS_FOLDER = {"failpoints"}  # checkpoint/writer.py runs alone
HOOK = {"amclip_ds_torchvision.pth", "amclip_ds_torchvision.py"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: a build leaves folders behind in its tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree / name)
    for folder in ("amclip_ds", "ds_configs", "environment", "slurm", "benchmarks"):
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
    for folder, pattern in (
        ("amclip_ds/recipes", "*/*.yaml"),
        ("ds_configs", "*.json"),
        ("ds_configs", "README.md"),
        ("slurm", "*.*"),
        ("slurm", "sites/*.env"),
        ("amclip_ds", "py.typed"),
    ):
        files = list((ROOT / folder).glob(pattern))
        assert files
        for file in files:
            name = file.relative_to(ROOT).as_posix()
            assert (name if name.startswith("amclip_ds/") else f"amclip_ds/{name}") in inside, name


def test_the_wheel_carries_the_benchmarks_that_need_no_checkout(wheel: Path) -> None:
    inside = {Path(name).stem for name in zipfile.ZipFile(wheel).namelist() if name.startswith("amclip_ds/benchmarks/")}
    every = {file.stem for file in (ROOT / "benchmarks").glob("*.py")}
    assert every - inside == {"equivalence", "fleet", "mutants"}, "those run the tests"


def test_both_kinds_of_install_place_the_torchvision_hook(wheel: Path, tree: Path, tmp_path: Path) -> None:
    """A .pth file and its module, at the top of what is installed: of a wheel and of `pip install -e`."""
    script = f"from setuptools import build_meta; print(build_meta.build_editable({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", script], cwd=tree, check=True, timeout=300, capture_output=True)
    for built in (wheel, *tmp_path.glob("*.whl")):
        assert set(zipfile.ZipFile(built).namelist()) >= HOOK, built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment that holds the wheel alone; what it depends on is read from this one's."""
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True, timeout=300)
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "-q", "--no-deps", "-I"]
    subprocess.run([*pip, "--no-index", str(wheel)], check=True, timeout=300)
    (here,) = home.glob("lib/python*/site-packages")
    (here / "zz_dependencies.pth").write_text(str(Path(pytest.__file__).resolve().parents[1]) + "\n")
    return home / "bin"


def run(installed: Path, at: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """One of the environment's commands in another folder, without the checkout on any path."""
    environment = {"PATH": f"{installed}:/usr/bin:/bin", "HOME": str(at), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [str(installed / words[0]), *words[1:]], cwd=at, env=environment, capture_output=True, text=True, timeout=300
    )


def test_an_installed_wheel_works_from_any_folder(installed: Path, tmp_path: Path) -> None:
    assert run(installed, tmp_path, "amclip", "--version").stdout == f"amclip_ds {amclip_ds.__version__}\n"
    assert "aclip-vitb16" in run(installed, tmp_path, "amclip", "recipes").stdout
    script = (
        "import amclip_ds; from amclip_ds.engine.student import EngineConfig, read_ds_config;"
        "print(amclip_ds.__file__, read_ds_config(EngineConfig('zero3_bf16.json'))['zero_optimization']['stage'])"
    )
    done = run(installed, tmp_path, "python", "-c", script)
    path, stage = done.stdout.split()
    assert installed.parent in Path(path).parents and stage == "3", done.stderr
    for module in ("gpu", "retrieval"):  # the first imports others of them
        done = run(installed, tmp_path, "python", "-m", f"amclip_ds.benchmarks.{module}", "--help")
        assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_an_installed_wheel_submits(installed: Path, tmp_path: Path) -> None:
    """Its jobs find environment.sh and Python without a checkout."""
    (tmp_path / "0.txt").write_text("a caption")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(64):
            tar.add(tmp_path / "0.txt", f"{number}.jpg")
            tar.add(tmp_path / "0.txt", f"{number}.txt")
    done = run(installed, tmp_path, "amclip", "submit", "aclip-tiny", "data.train=0.tar", "run.out=run", "--dry-run")
    assert done.returncode == 0, done.stderr
    script = (tmp_path / "run" / "slurm" / "train.sbatch").read_text()
    own = re.search("^AMCLIP_HOME=(\\S+)\nsubmit_python=\\S+$", script, re.M)
    assert own is not None
    read = f"SLURM_SUBMIT_DIR=. SLURM_JOB_ID=1 {' '.join(own[0].split())}"
    lines = f". {own[1]}/slurm/environment.sh && echo $python"
    job = subprocess.run(["bash", "-c", f"export {read}; {lines}"], cwd=tmp_path, capture_output=True, text=True)
    assert job.stdout.strip() == str(installed / "python"), job.stderr

    done = run(installed, tmp_path, "amclip", "submit", "--scripts", "slurm")
    assert done.returncode == 0 and (tmp_path / "slurm" / "train.sbatch").is_file(), done.stderr
    assert run(installed, tmp_path, "amclip", "submit", "--scripts", "slurm").returncode == 2


def test_the_readme_runs_with_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    """Its lines of Python, as they are, on a run and two pictures."""
    write_run(tmp_path / "runs" / "aclip-vitb16")
    for name in ("cat", "dog"):
        picture((90, 70), len(name)).save(tmp_path / f"{name}.jpg")
    lines = re.search("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)  # type: ignore[union-attr]
    assert len(lines.strip().splitlines()) == 7
    ending = (
        "import sys\nassert probabilities.shape == cosines.shape == (2, 2)\n"
        "assert probabilities.sum(1).sub(1).abs().max() < 1e-5 and 'deepspeed' not in sys.modules\n"
        "print(amclip_ds.__file__)"
    )
    done = run(installed, tmp_path, "python", "-c", lines + ending)
    assert installed.parent in Path(done.stdout.strip()).parents, done.stderr


UNIMPORTED = {"torchvision": "timm and open_clip need it", "ninja": "torch compiles DeepSpeed's ops with it"}


def imported_modules() -> dict[str, str]:
    """Each module outside the standard library that the package imports by name, and a file that does."""
    found = {}
    for path in (ROOT / "amclip_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found |= {name.split(".")[0]: str(path) for name in names}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | {"amclip_ds"}}


def plain(name: str) -> str:
    return re.match("[A-Za-z0-9_.-]+", name).group().lower().replace("-", "_")  # type: ignore[union-attr]


def test_what_is_imported_is_declared_and_the_reverse() -> None:
    """Each package that the code imports by name is in pyproject.toml; what is declared to run is imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = {plain(word) for word in project["dependencies"]}
    needed |= {plain(word) for extra in extras for word in extras[extra] if extra != "dev"}
    declared = needed | {plain(word) for word in extras["dev"]}
    imported = imported_modules()
    packages = importlib.metadata.packages_distributions()
    of_module = {module: {plain(name) for name in packages.get(module, [module])} for module in imported}
    assert not {
        module: path
        for module, path in imported.items()
        if not of_module[module] & declared and module not in LOADED_FROM_ITS_FOLDER
    }
    assert needed - set().union(*of_module.values()) == set(UNIMPORTED)


def test_version_licence_and_citation_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == amclip_ds.__version__ and citation["license"] == project["license"] == "MIT"
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["title"] and citation["message"]
    assert citation["references"][0]["title"] == "Attentive Mask CLIP"
    assert set(project["optional-dependencies"]) >= {"gpu", "fp8", "onnx", "track", "dev"}


def test_a_release_is_refused_before_anything_changes(tmp_path: Path) -> None:
    """The version, the tree, the tag, the changelog; what follows needs the network and is run by hand."""
    script = ROOT / ".ci" / "release.sh"
    (tmp_path / ".ci").mkdir()
    shutil.copy(script, tmp_path / ".ci")
    (tmp_path / "CHANGELOG.md").write_text("## Unreleased\n\n## 0.1.0\n\n- First.\n")

    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=tmp_path, check=True)

    def release(*words: str) -> str:
        done = subprocess.run(["bash", ".ci/release.sh", *words], cwd=tmp_path, capture_output=True, text=True)
        return f"{done.returncode} {done.stderr}"

    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "x")
    git("tag", "v0.3.0")
    assert release("0.2").startswith("2 release: 0.2 is no version")
    assert release("0.3.0").startswith("2 release: the tag v0.3.0 exists")
    assert release("0.2.0").startswith("2 release: CHANGELOG.md has nothing under Unreleased")
    (tmp_path / "CHANGELOG.md").write_text("## Unreleased\n\n- New.\n")
    assert release("0.2.0").startswith("2 release: commit or stash")
