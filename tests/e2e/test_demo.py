"""`amclip demo` in small: the whole path, its numbers, its pictures, and a folder that is not its own."""

import json
from pathlib import Path

from PIL import Image

from tests.e2e.conftest import Amclip

NUMBERS = {
    "seconds",
    "setup_seconds",
    "train_seconds",
    "classes",
    "acc1_student",
    "acc1_teacher",
    "acc1_colour",
    "acc1_shape",
    "object_kept_attentive",
    "object_kept_random",
    "acc1_random",
    "run",
    "control",
}


def test_the_demo_leaves_numbers_pictures_and_a_run(tmp_path: Path, amclip: Amclip) -> None:
    out = tmp_path / "demo"
    code, printed = amclip("demo", "--out", str(out), "--steps", "8", "--scenes", "640", timeout_s=600)
    assert code == 0, printed
    numbers = json.loads((out / "demo.json").read_text())
    assert set(numbers) >= NUMBERS and numbers["classes"] == 64 and numbers["precision"] == "fp32"
    for name in NUMBERS - {"seconds", "setup_seconds", "train_seconds", "classes", "run", "control"}:
        assert 0 <= numbers[name] <= 1
    assert abs(numbers["object_kept_random"] - 0.5) < 0.06, "half of the tokens stay, whatever they show"
    assert {"student.safetensors", "teacher.safetensors", "eval.jsonl"} <= {
        p.name for p in Path(numbers["run"]).iterdir()
    }
    for picture in ("masks.png", "curves.png"):
        with Image.open(out / picture) as image:
            assert image.width > 600
        assert str(out / picture) in printed


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, amclip: Amclip) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    code, printed = amclip("demo", "--out", str(tmp_path))
    assert code == 2 and "holds something else" in printed
    assert (tmp_path / "thesis.tex").read_text() == "mine"
