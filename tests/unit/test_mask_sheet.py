"""`amclip masks`: what every mask keeps of the same images, as training would; mistakes are one line and code 2."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from amclip_ds import cli, samples
from amclip_ds import config as settings
from amclip_ds.data import photometric
from amclip_ds.data.synthetic import write_dataset
from amclip_ds.engine import compile as compiling
from amclip_ds.evaluate.source import build_towers, locate
from amclip_ds.masks import MASKS
from amclip_ds.masks.text import TextMaskConfig
from amclip_ds.method import method_of
from amclip_ds.model.amclip import AClip
from amclip_ds.pictures import first_samples, mask_sheet, observe
from amclip_ds.pictures.mask_statistics import object_share
from tests.unit.data.shards import write_tar


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/ with the weights of an untrained model of one block, scenes/test with boxes."""
    folder = tmp_path_factory.mktemp("masks")
    write_dataset(folder / "scenes", 8, 8, 64, 0)
    run = folder / "run"
    run.mkdir()
    config = settings.load(
        "aclip-tiny", ["data.train=x", "model.vision.depth=1", "model.text.depth=1", f"run.out={run}"]
    )
    config.data.exclude = "/gone/out.txt"  # what the run left out of its own shards, and has here no longer
    config.data.text_mask = TextMaskConfig("frequency", 8, "/gone/words.json")
    (run / "config.yaml").write_text(settings.dump(config))
    torch.manual_seed(0)
    module = AClip(config.model)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    for name in ("student", "teacher"):
        save_file(
            {key: value.contiguous() for key, value in module.state_dict().items()},
            run / f"{name}.safetensors",
            metadata={"step": "7"},
        )
    return folder


def test_every_mask_is_shown_on_the_same_images(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, numbers = place / "out", place / "numbers.json"
    words = ["masks", str(place / "run"), "--data", str(place / "scenes" / "test"), "--out", str(out)]
    assert cli.main([*words, "--images", "5", "--json", str(numbers)]) == 0
    printed = capsys.readouterr().out
    assert str(out / "masks.png") in printed and str(out / "masks.html") in printed
    found = json.loads(numbers.read_text())
    assert (found["images"], found["weights"], found["step"], found["patches"]) == (5, "teacher", 7, 64)
    assert list(found["masks"]) == list(MASKS), "each mask there is, those of others too"
    for facts in found["masks"].values():
        assert facts["kept"] == [32, 32] and 0 <= facts["object_share"] <= 1
    attended, avoided = (found["masks"][name]["object_share"] for name in ("attentive", "attentive_inverse"))
    assert attended + avoided == pytest.approx(1), "half is kept: what one keeps the other removes"
    with Image.open(out / "masks.png") as picture:
        assert picture.width > 18 * 112 and picture.height > 5 * 112
    text = (out / "masks.html").read_text()
    assert "Attentive: what the teacher attends to stays" in text and "://" not in text


def test_the_masks_are_those_of_a_training_step(place: Path) -> None:
    """Twin: of disjoint views no token is in both, of random ones some are."""
    located = locate(place / "run")
    assert located.config is not None
    towers, method = build_towers(located, "teacher"), method_of(located.config)
    batch, boxes = mask_sheet.load_images(located.config, str(place / "scenes" / "test"), 4, place / "scratch")
    assert boxes is not None
    scores = mask_sheet.attention(towers, batch, method)
    shared = {}
    for name in ("disjoint", "random"):
        first, second = mask_sheet.kept_by(name, method, towers, batch, scores, boxes).by_view
        shared[name] = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(first, second))
    assert shared["disjoint"] == 0 and shared["random"] > 0


@pytest.mark.parametrize(
    "recipe, strategy, by_view",
    [
        ("aclip-tiny", "attentive", [32, 32]),
        ("maskclip-tiny", "random", [64, 16]),  # its first view is not masked
        ("maskclip-tiny", "attentive", [64, 16]),  # by the attention to the first view
        ("detailclip-tiny", "attentive", [32, 32]),  # by the attention to each view
    ],
)
def test_the_numbers_are_the_runs_own(
    recipe: str, strategy: str, by_view: list[int], place: Path, tmp_path: Path
) -> None:
    """As the run's pictures find them on the same samples, of which the sheet holds the same views and boxes."""
    shards = str(place / "scenes" / "test")
    keys = [f"data.train={shards}", f"run.out={tmp_path}", "batch.global_size=8"]
    keys += ["model.vision.depth=1", "model.text.depth=1"]
    if "maskclip" in recipe:
        keys.append(f"data.views.1.mask.strategy={strategy}")
    config = settings.load(recipe, keys)
    torch.manual_seed(0)
    towers, method = AClip(config.model), method_of(config)
    for parameter in towers.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    engine: Any = SimpleNamespace(attention=towers.attention, choose=towers.choose)
    with samples.opened(samples.for_reading(config, tmp_path)) as data:
        batch, boxes = first_samples(data)
    shot = observe(batch, method, engine, engine, progress=1.0)
    of_run = object_share(shot.kept, boxes, batch.boxes[:-1], method.grid, batch.flips)

    shown, boxes = mask_sheet.load_images(config, shards, len(batch.sample_ids), tmp_path / "sheet")
    for name in ("sample_ids", "views_uint8", "boxes"):
        assert torch.equal(getattr(shown, name), getattr(batch, name)), name
    scores = mask_sheet.attention(towers, shown, method)
    found = mask_sheet.kept_by(strategy, method, towers, shown, scores, boxes)
    assert found.tokens == by_view
    for of_view, expected in zip(found.by_view, shot.kept, strict=True):
        assert of_view.shape[-1] == method.grid**2 if expected is None else torch.equal(of_view, expected)
    assert found.object_share == of_run and of_run is not None
    assert mask_sheet.draw(shown, scores, [found], method, boxes).height > len(batch.sample_ids) * 112


def test_a_picture_compiles_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's pictures show its few images by towers that are compiled for the shapes of its steps."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", backend)
    located = locate(place / "run")
    assert located.config is not None
    towers, method = build_towers(located, "teacher"), method_of(located.config)
    batch, _ = mask_sheet.load_images(located.config, str(place / "scenes" / "test"), 4, place / "few")
    engine: Any = SimpleNamespace(attention=towers.attention, choose=towers.choose)
    plain = observe(batch, method, engine, engine, progress=1.0)
    assert compiling.compile_towers(towers, "tower") is None
    graphs.clear()  # of the compiler's trial
    shot = observe(batch, method, engine, engine, progress=1.0)
    assert shot.scores is not None and plain.scores is not None and torch.equal(shot.scores, plain.scores)
    assert not graphs
    with torch.no_grad():
        towers.attention(photometric.normalise(batch.views_uint8[0]))
    assert graphs, "the twin: a pass like it, outside of a picture"


def test_a_run_that_removes_nothing_has_no_share(place: Path, tmp_path: Path) -> None:
    shards = str(place / "scenes" / "test")
    config = settings.load("clip-tiny", [f"data.train={shards}", "model.vision.depth=1", "model.text.depth=1"])
    towers, method = AClip(config.model), method_of(config)
    batch, boxes = mask_sheet.load_images(config, shards, 4, tmp_path)
    assert boxes is not None and batch.teacher_uint8 is not None, "a crop to show the attention of"
    found = mask_sheet.kept_by("random", method, towers, batch, mask_sheet.attention(towers, batch, method), boxes)
    assert set(found.tokens) == {64} and found.object_share is None


def test_images_without_boxes_have_no_share(place: Path, tmp_path: Path) -> None:
    with Image.open(place / "out" / "masks.png") as picture:
        picture.crop((0, 0, 200, 200)).save(tmp_path / "x.png")
    write_tar(tmp_path / "a.tar", {"1.png": (tmp_path / "x.png").read_bytes(), "1.txt": b"a picture"})
    words = ["masks", str(place / "run"), "--data", str(tmp_path / "a.tar"), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--mask", "random", "--json", str(tmp_path / "n.json")]) == 0
    assert json.loads((tmp_path / "n.json").read_text())["masks"] == {
        "random": {"kept": [32, 32], "object_share": None}
    }


@pytest.mark.parametrize(
    "change, said",
    [
        ({"--mask": "atentive"}, "--mask atentive: there are random, attentive"),
        ({"--data": "/nowhere/*.tar"}, "--data: '/nowhere/*.tar' matches no file"),
        ({"SOURCE": "/nowhere"}, "neither a run"),
        ({"--images": "0"}, "0 is below 1"),
    ],
)
def test_a_mistake_is_one_line(
    change: dict, said: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--data": str(place / "scenes" / "test"), "--out": str(tmp_path / "out")} | change
    source = given.pop("SOURCE", str(place / "run"))
    assert cli.main(["masks", source, *(word for pair in given.items() for word in pair)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]
