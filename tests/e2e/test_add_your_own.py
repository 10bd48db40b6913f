"""docs/add-your-own.md: its mask and its objective, as the page has them, through `amclip train`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from amclip_ds.jsonl import read_lines
from tests.e2e.conftest import Amclip

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-your-own.md"
NAMES = {"contrast.py": 30, "dense.py": 60}  # the page's files and their lines, at most


def files_of_the_page(folder: Path) -> list[str]:
    """Writes the page's python blocks; returns the words that load them."""
    words = []
    for name, text in zip(NAMES, re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL), strict=True):
        (folder / name).write_text(text)
        words.append(f"--plugin={folder / name}")
    return words


def test_the_page_keeps_its_promise_of_length(tmp_path: Path) -> None:
    files_of_the_page(tmp_path)
    lengths = {name: len((tmp_path / name).read_text().splitlines()) for name in NAMES}
    print("lines:", lengths)
    assert all(lengths[name] <= most for name, most in NAMES.items())


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory, amclip: Amclip) -> tuple[Path, list[str]]:
    """5 steps with both parts on 2 ranks under ZeRO-3 with GradCache of 2 pieces; and the words that continue."""
    folder = tmp_path_factory.mktemp("own")
    words = [
        "train",
        "aclip-tiny",
        f"data.train={scenes}/train",
        f"run.out={folder}/run",
        "run.steps=5",
        "log.every_steps=1",
        "batch.global_size=16",
        "batch.per_gpu=4",
        "data.workers=1",
        "engine.deepspeed=zero3_fp32.json",
        "log.tensorboard=false",
        "run.deterministic=true",
        "checkpoint.every_steps=3",
        "checkpoint.keep_last=9",
        "mask.strategy=contrast",
        "mask.contrast.noise=0.5",
        "loss.dense.weight=0.5",
        "loss.dense.prototypes=32",
        *files_of_the_page(folder),
    ]
    code, printed = amclip(*words, ranks=2)
    assert code == 0, printed
    return folder, words


def test_its_mask_and_objective_train(trained: tuple[Path, list[str]]) -> None:
    folder, _ = trained
    rows = read_lines(folder / "run" / "metrics.jsonl")
    assert len(rows) == 5 and all(row["kept_tokens"] == 32 and row["loss_dense"] > 0 for row in rows)
    weights = load_file(folder / "run" / "student.safetensors")
    assert weights["objectives.dense.centre"].abs().min() > 0  # it moved
    assert "objectives.dense.head.weight" in load_file(folder / "run" / "teacher.safetensors")
    copies = sorted(path.name[:15] for path in (folder / "run").glob("plugin-*.py.txt"))
    assert len(copies) == 2 and copies[0] == "plugin-contrast"
    config = (folder / "run" / "config.yaml").read_text()
    assert "- contrast sha256:" in config and "- dense sha256:" in config and "prototypes: 32" in config


def test_a_resume_is_exact_with_its_centre(trained: tuple[Path, list[str]], tmp_path: Path, amclip: Amclip) -> None:
    """3 + 2 steps are 5. Twin: what was committed at step 3 is not what it was at step 5."""
    folder, words = trained
    again = tmp_path / "run"
    shutil.copytree(folder / "run" / "checkpoints" / "step_00000003", again / "checkpoints" / "step_00000003")
    code, printed = amclip(*[f"run.out={again}" if word.startswith("run.out=") else word for word in words], ranks=2)
    assert code == 0, printed
    assert "resumes from" in printed and read_lines(again / "metrics.jsonl")[0]["step"] == 4
    for name in ("student", "teacher"):
        first, second = (path / f"{name}.safetensors" for path in (folder / "run", again))
        assert first.read_bytes() == second.read_bytes()
    whole, late = (read_lines(path / "metrics.jsonl") for path in (folder / "run", again))
    assert [row["loss"] for row in whole[3:]] == [row["loss"] for row in late]


def test_the_run_is_evaluated_and_exported_without_the_plugins(
    trained: tuple[Path, list[str]], scenes: Path, tmp_path: Path, amclip: Amclip
) -> None:
    """And none of its files causes an import: the plug-ins' files are gone."""
    run = tmp_path / "run"
    shutil.copytree(trained[0] / "run", run)
    text = (run / "config.yaml").read_text()
    assert "strategy: contrast" in text
    code, printed = amclip("eval", str(run), "--data", str(scenes), "--json", f"{tmp_path}/numbers.json")
    assert code == 0, printed
    assert {row["weights"] for row in json.loads((tmp_path / "numbers.json").read_text())} == {"student", "teacher"}
    checkpoint = run / "checkpoints" / "step_00000003"
    code, printed = amclip("eval", str(checkpoint), "--data", str(scenes), "--weights", "teacher", "--no-append")
    assert code == 0, printed
    code, printed = amclip("export", str(run), "--format", "open_clip", "--out", f"{tmp_path}/exported")
    assert code == 0, printed
    assert amclip("checkpoints", str(run))[0] == 0
    code, printed = amclip("watch", str(run), "--data", str(scenes), "--once")
    assert code == 0, printed


def test_a_resume_without_a_plugin_says_to_add_it(trained: tuple[Path, list[str]], amclip: Amclip) -> None:
    folder, words = trained
    named = [word for word in words if not word.startswith("--plugin")]
    code, printed = amclip(*named)
    assert code == 2 and "--plugin FILE.py" in printed, printed
    unnamed = [word for word in named if "contrast" not in word and "dense" not in word]
    code, printed = amclip(*unnamed)
    assert code == 2 and "add --plugin: [contrast sha256:" in printed, printed
    code, printed = amclip("train", f"{folder}/run/config.yaml", f"run.out={folder}/run")
    assert code == 2 and "the plug-in contrast; add --plugin" in printed, printed


IN_THE_HOUSE = """
import torch
from amclip_ds import config
from amclip_ds.method import method_of
from amclip_ds.model.amclip import AClip
from amclip_ds.objectives import builder

settings = config.load("house-tiny", ["mask.contrast.noise=0.5", "loss.dense.prototypes=32"])
with torch.device("meta"):
    model = AClip(settings.model, builder(method_of(settings).objectives))
print(settings.mask.strategy, sorted(model.objectives), model.objectives["dense"].head.out_features)
"""


def move_in(file: Path, room: Path, table: str, importing: str, name: str, entry: str) -> None:
    """A plug-in's file becomes the package's: without its dict, and with its line in the room's."""
    text = file.read_text().replace("from amclip_ds.masks import Mask\n", "")
    (room / file.name).write_text(text[: text.index(f"{table} = ")])
    lines = (room / "__init__.py").read_text().splitlines(keepends=True)
    first = next(place for place, line in enumerate(lines) if line.startswith("from amclip_ds"))
    lines.insert(first, f"{importing} {name}\n")
    opening = next(place for place, line in enumerate(lines) if line.startswith(f"{table}: "))
    lines.insert(opening + 1, f'    "{file.stem}": {entry},\n')
    (room / "__init__.py").write_text("".join(lines))


def test_in_the_package_each_touches_its_file_its_line_and_its_recipe(tmp_path: Path) -> None:
    """The page's parts moved into a copy of the package."""
    package = tmp_path / "amclip_ds"
    shutil.copytree(PAGE.parents[1] / "amclip_ds", package, ignore=shutil.ignore_patterns("__pycache__"))
    before = {path: path.read_bytes() for path in package.rglob("*") if path.is_file()}
    files_of_the_page(tmp_path)
    mask = 'Mask(contrast.priority, frozenset({"pixels", "noise"}), contrast.Options)'
    rooms = package / "masks", package / "objectives"
    move_in(tmp_path / "contrast.py", rooms[0], "MASKS", "from amclip_ds.masks import", "contrast", mask)
    move_in(tmp_path / "dense.py", rooms[1], "OBJECTIVES", "from amclip_ds.objectives.dense import", "Dense", "Dense")
    (package / "recipes" / "methods" / "house.yaml").write_text(
        "mask: {strategy: contrast}\nloss: {dense: {weight: 0.5}}\n"
    )
    changed = {path for path in package.rglob("*") if path.is_file() and before.get(path) != path.read_bytes()}
    print("files touched:", sorted(str(path.relative_to(package)) for path in changed))
    assert len(changed) == 5  # for each: its file, its line in the dict; one recipe has both
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_HOUSE],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "contrast ['byol', 'contrastive', 'dense', 'simclr'] 32" in done.stdout
