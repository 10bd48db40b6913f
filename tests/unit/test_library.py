"""The Python interface: the embeddings of `amclip eval`, in the order given, without DeepSpeed; names of the hub."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

import amclip_ds
from amclip_ds import config, hub
from amclip_ds.cli import main
from amclip_ds.comm import SingleProcess
from amclip_ds.data import photometric
from amclip_ds.errors import UserError
from amclip_ds.evaluate.datasets import open_set
from amclip_ds.evaluate.encoder import encode_images
from amclip_ds.evaluate.source import locate, open_encoder
from amclip_ds.model import pretrained
from tests.unit.evaluate.exports import FORMATS, write_checkpoint, write_export, write_run
from tests.unit.evaluate.test_encoder import picture


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> amclip_ds.Model:
    return amclip_ds.load(run)


PICTURES = [picture((70 + 9 * n, 64), n) for n in range(5)]
PIXELS = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)


def test_embeddings_are_those_of_eval(run: Path, model: amclip_ds.Model, tmp_path: Path) -> None:
    """To the bit, from files as from pictures, upright and on white; of texts too."""
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        PICTURES[number].save(tmp_path / name / "1.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    PICTURES[2].save(tmp_path / "a" / "2.jpg", exif=turned)
    PICTURES[3].convert("RGBA").rotate(45, expand=True).save(tmp_path / "b" / "2.webp", lossless=True)
    data = open_set(str(tmp_path))
    encoder = open_encoder(locate(run), "teacher", torch.device("cpu"))
    expected = encode_images(encoder, data.samples, 64, SingleProcess())
    given = [Image.open(sample.path) for sample in data.samples]
    rows = model.encode_image(given)
    assert torch.equal(rows, expected) and rows.dtype == torch.float32 and rows.device.type == "cpu"
    assert torch.equal(model.encode_image(torch.stack([model.preprocess(image) for image in given])), expected)
    assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=1e-6)
    texts = ["a red circle", "a dog"]
    assert torch.equal(model.encode_text(texts), encoder.text([*texts, *[""] * 62])[:2])


def test_a_tensor_gives_what_its_pictures_do(run: Path, tmp_path: Path) -> None:
    """Floats are normalised already: a second time would be of other images, in silence."""
    checkpoint = write_checkpoint(tmp_path / "run")
    write_export("open_clip", tmp_path / "export")
    for source, kind in ((run, "run"), (checkpoint, "checkpoint"), (tmp_path / "export", "open_clip")):
        model = amclip_ds.load(source, weights="student")
        assert model.kind == kind
        pixels = torch.stack([model.preprocess(image) for image in PICTURES])
        expected = model.encode_image(PICTURES)
        assert torch.equal(model.encode_image(pixels), expected)
        assert torch.equal(model.encode_image(photometric.normalise(pixels)), expected)
        assert torch.equal(model._encoder.features(photometric.normalise(pixels)), model._encoder.features(pixels))
        if kind != "open_clip":
            assert torch.equal(model.attention(photometric.normalise(pixels)), model.attention(pixels))


def test_zero_shot_gives_probabilities_in_the_order_of_the_classes(model: amclip_ds.Model) -> None:
    classes = ["circle", "dog", "green square"]
    found = model.zero_shot(PICTURES, classes)
    assert found.shape == (5, 3) and torch.allclose(found.sum(1), torch.ones(5), atol=1e-5)
    assert torch.allclose(model.zero_shot(PICTURES, classes[::-1]), found.flip(1), atol=1e-6)
    one = model.zero_shot(PICTURES, classes, templates=["a {c}"])
    assert torch.equal(model.zero_shot(PICTURES, classes, templates="a {c}"), one)
    texts = model.encode_text([f"a {name}" for name in classes])
    expected = (model.logit_scale * model.encode_image(PICTURES) @ texts.T).softmax(-1)
    assert torch.allclose(one, expected, atol=1e-6) and not torch.allclose(one, found, atol=1e-6)


def test_attention_is_the_score_map_of_the_tower(run: Path, model: amclip_ds.Model) -> None:
    maps = model.attention(PICTURES)
    assert (
        maps.shape[0] == 5
        and maps.shape[1] == maps.shape[2]
        and (maps > 0).all()
        and (maps.flatten(1).sum(1) < 1).all()
    )
    alone = torch.cat([model.attention([image], batch_size=1) for image in PICTURES])
    assert torch.allclose(maps, alone, atol=1e-6)
    assert not torch.equal(amclip_ds.load(run, weights="student").attention(PICTURES), maps)


def test_student_and_teacher_are_chosen(run: Path, model: amclip_ds.Model) -> None:
    student = amclip_ds.load(str(run), weights="student")
    assert (model.weights, student.weights, student.step, model.kind) == ("teacher", "student", 7, "run")
    assert not torch.allclose(student.encode_text(["a"]), model.encode_text(["a"]))
    assert model.logit_scale == student.logit_scale


def in_a_thread(call: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@pytest.mark.parametrize(
    "act, said",
    [
        (lambda model: model.encode_image([]), "no image was given"),
        (lambda model: model.encode_image(["cat.jpg"]), "image 0: a str, where a PIL image is expected"),
        (
            lambda model: model.encode_image(torch.zeros(2, 3, 5, 5)),
            r"images of the shape \[2, 3, 5, 5\]; it is \[N, 3",
        ),
        (lambda model: model.encode_image(torch.zeros(1, 3, 64, 64, dtype=torch.int64)), "images of torch.int64"),
        (lambda model: model.encode_text([]), "texts: a list of str"),
        (lambda model: model.encode_text(["a", 3]), "texts: a list of str"),
        (lambda model: model.encode_text(None), "texts: a list of str"),
        (lambda model: model.zero_shot(PICTURES, ["a"], templates=["b"]), "has {c} for the class name"),
        (lambda model: model.zero_shot(PICTURES, ["a"], templates=[]), "texts: a list of str"),
        (lambda model: model.encode_image(Path("cat.jpg")), "images: a PosixPath, where PIL images are expected"),
        (lambda model: model.attention([]), "no image was given"),
        (lambda model: model.attention(["cat.jpg"]), "image 0: a str, where a PIL image is expected"),
        (lambda model: model.encode_image(Image.new("La", (8, 8))), "image 0: conversion from La"),
        (lambda model: model.encode_image(Image.new("RGB", (0, 5))), "image 0: 0 x 5 pixels, so there is nothing"),
        (lambda model: model.attention([PICTURES[0], Image.new("RGB", (5, 0))]), "image 1: 5 x 0 pixels"),
        (lambda model: model.preprocess(Image.new("RGB", (0, 0))), "the image: 0 x 0 pixels"),
        (lambda model: model.encode_image(PICTURES, batch_size=0), "batch_size: 0; a whole number of 1 or more"),
        (lambda model: model.encode_image(PIXELS, batch_size=-1), "batch_size: -1; a whole number"),
        (lambda model: model.encode_text(["a"], batch_size=0), "batch_size: 0; a whole number"),
        (lambda model: model.attention(PICTURES, batch_size=0), "batch_size: 0; a whole number"),
        (lambda model: model.attention(PIXELS, batch_size=-1), "batch_size: -1; a whole number"),
        (lambda model: model.zero_shot(PICTURES, ["a"], batch_size=2.5), "batch_size: 2.5; a whole number"),
        (lambda model: amclip_ds.load("nowhere"), "neither a run"),
        (lambda model: amclip_ds.load_config("clip-tiny", "data.train=x"), "overrides: 'data.train=x' is no list of"),
        (lambda model: amclip_ds.load_config("clip-tiny", {"data.train": "x"}), "overrides: {'data.train': 'x'} is no"),
        (lambda model: amclip_ds.train("clip-tiny"), "train: a str, where load_config's TrainConfig is expected"),
        (lambda model: in_a_thread(lambda: amclip_ds.train(config.load("clip-tiny"))), "train: .* main thread"),
    ],
)
def test_a_mistake_is_one_line(model: amclip_ds.Model, act: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        act(model)  # type: ignore[operator]


def test_what_is_no_model_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UserError, match="neither a run .* a model of the hub is hf-hub:laion/CLIP-tiny"):
        amclip_ds.load("laion/CLIP-tiny")
    with pytest.raises(UserError, match="write it as hf-hub:ORG/NAME"):
        amclip_ds.load("hf-hub:../../etc")
    write_export("open_clip", tmp_path / "export")
    for device in ("cuda:99", "gpu"):
        with pytest.raises(amclip_ds.UserError, match=f"device: {device}: "):
            amclip_ds.load(run, device=device)
    with pytest.raises(UserError, match="holds student, no teacher"):
        amclip_ds.load(tmp_path / "export", weights="teacher")
    export = amclip_ds.load(f"local-dir:{tmp_path}/export")
    assert export.kind == "open_clip" and export.tokenizer(["a dog"]).shape == (1, 77)
    with pytest.raises(UserError, match="attention: open_clip does not give it"):
        export.attention(PICTURES)
    same = amclip_ds.load(run, weights="student")
    assert torch.allclose(export.encode_image(PICTURES), same.encode_image(PICTURES), atol=1e-5)
    assert torch.equal(same.tokenizer(["a dog"]), export.tokenizer(["a dog"]))


def test_an_image_tower_alone_embeds_images_alone(tmp_path: Path) -> None:
    write_export("timm", tmp_path / "export")
    tower = amclip_ds.load(tmp_path / "export")
    assert tower.encode_image(PICTURES).shape[0] == 5
    for act, what in (
        (lambda: tower.logit_scale, "logit_scale"),
        (lambda: tower.encode_text(["a"]), "encode_text"),
        (lambda: tower.tokenizer(["a"]), "tokenizer"),
        (lambda: tower.zero_shot(PICTURES, ["a", "b"]), "zero_shot"),
    ):
        with pytest.raises(UserError, match=f"^{what}: timm holds the image tower alone"):
            act()


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_file_of_an_export_is_downloaded(fmt: str, tmp_path: Path) -> None:
    """An ONNX graph without its weights, which are a file beside it, cannot be loaded."""
    write_export(fmt, tmp_path / "export")
    written = [file.name for file in (tmp_path / "export").iterdir()]
    assert list(filter_repo_objects(written, allow_patterns=list(hub.DOWNLOADED))) == written


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An export in the hub's cache, as a download leaves it: files are links to blobs."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    write_export("open_clip", tmp_path / "export")
    home, revision = tmp_path / "models--org--tiny", "0" * 40
    for folder in ("blobs", "refs", f"snapshots/{revision}"):
        (home / folder).mkdir(parents=True)
    (home / "refs" / "main").write_text(revision)
    for number, file in enumerate((tmp_path / "export").iterdir()):
        file.rename(home / "blobs" / str(number))
        (home / "snapshots" / revision / file.name).symlink_to(f"../../blobs/{number}")
    return "hf-hub:org/tiny"


def test_a_model_of_the_hub_is_read_from_its_cache(cached: str) -> None:
    assert amclip_ds.load(cached).encode_text(["a dog"]).shape[0] == 1
    assert pretrained.open_source(cached).format == "open_clip"
    with pytest.raises(UserError, match="HF_HUB_OFFLINE keeps it from being downloaded; .* hf download org/other"):
        hub.local("hf-hub:org/other")
    with pytest.raises(UserError, match="hf download org/tiny --revision v2"):
        hub.local("hf-hub:org/tiny@v2")
    assert main(["eval", "hf-hub:org/other", "--data", "/nowhere"]) == 2


@pytest.mark.slow
def test_the_interface_brings_no_deepspeed(run: Path, tmp_path: Path) -> None:
    """And the package itself imports nothing."""
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    code = (
        "import sys, time, amclip_ds\n"
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules) and 'load' in dir(amclip_ds)\n"
        "began = time.perf_counter()\n"
        "from PIL import Image\n"
        f"model = amclip_ds.load({str(run)!r})\n"
        f"images = [Image.open({str(tmp_path / 'a.png')!r})]\n"
        "model.zero_shot(images, ['a', 'b']), model.attention(images)\n"
        "assert amclip_ds.TrainConfig and amclip_ds.load_config('aclip-tiny').run.steps\n"
        "print('deepspeed' in sys.modules, f'{time.perf_counter() - began:.1f} s to load and use it')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    print(done.stdout)
    assert done.stdout.startswith("False"), done.stderr
