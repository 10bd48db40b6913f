"""Sharing of the batches: whole, each once, the same on any number of ranks; pixels as torchvision makes them."""

import contextlib
import io
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from amclip_ds import config
from amclip_ds.comm import SingleProcess
from amclip_ds.data.captions import build_tokenizer
from amclip_ds.errors import UserError
from amclip_ds.evaluate import encoder as encoding
from amclip_ds.evaluate import zero_shot
from amclip_ds.evaluate.datasets import open_set
from amclip_ds.evaluate.encoder import TowerEncoder, encode_images, encode_texts, resize_and_crop
from amclip_ds.evaluate.source import locate, open_encoder
from amclip_ds.model.amclip import AClip, ModelConfig
from amclip_ds.model.init import Start, initialise
from amclip_ds.model.text import TextConfig
from amclip_ds.model.vision import VisionConfig
from tests.unit.evaluate.exports import write_run
from tests.unit.thread_ranks import run_threads

SIZES = [(64, 64), (187, 144), (144, 189), (90, 351), (33, 40), (500, 65)]


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def write_set(folder: Path, num_images: int = 21, num_classes: int = 5, num_shards: int = 2) -> Path:
    """A classification set in CLIP_benchmark's layout."""
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("".join(f"thing {n}\n" for n in range(num_classes)))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c} here\n")
    (folder / "dataset_type.txt").write_text("classification\n")
    (folder / "test" / "nshards.txt").write_text(str(num_shards))
    for shard in range(num_shards):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for number in range(shard, num_images, num_shards):
                content = io.BytesIO()
                picture(SIZES[number % len(SIZES)], number).save(content, "PNG")
                for name, data in ((f"{number}.png", content.getvalue()), (f"{number}.cls", b"%d" % (number % 5))):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def tiny_encoder() -> TowerEncoder:
    config = ModelConfig(
        vision=VisionConfig(name="vit_tiny_patch16_224", image_size=32, patch_size=8, width=32, depth=2, heads=2),
        text=TextConfig(width=32, depth=1, heads=2, activation="gelu"),
        embed_dim=16,
    )
    module = AClip(config)
    initialise(module, Start(0, config))
    return TowerEncoder(module.requires_grad_(False), "student", 32, 77, torch.device("cpu"))


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_torchvisions(size: tuple[int, int]) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

    image = picture(size, 1)
    theirs = Compose([Resize(48, InterpolationMode.BILINEAR), CenterCrop(48), PILToTensor()])(image)
    assert torch.equal(resize_and_crop(image, 48), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [4, 8, 64])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_ranks_gives_the_same_bits(batch_size: int, world_size: int, tmp_path: Path) -> None:
    data, model = open_set(str(write_set(tmp_path / "set"))), tiny_encoder()
    alone = encode_images(model, data.samples, batch_size, SingleProcess())
    row = zero_shot.evaluate(model, data, batch_size, SingleProcess())
    texts = [f"text {n}" for n in range(13)]
    words = encode_texts(model, texts, batch_size, SingleProcess())
    assert alone.shape == (21, 16)

    def work(comm):
        rank_model = TowerEncoder(model.towers, "student", 32, 77, torch.device("cpu"))  # a classifier of its own
        return (
            encode_images(rank_model, data.samples, batch_size, comm),
            encode_texts(rank_model, texts, batch_size, comm),
            zero_shot.evaluate(rank_model, data, batch_size, comm),
        )

    for images, rank_words, rank_row in run_threads(world_size, work):
        assert torch.equal(images, alone) and torch.equal(rank_words, words) and rank_row == row


def test_a_run_that_masked_its_texts_reads_whole_prompts(tmp_path: Path) -> None:
    """Two prompts that differ behind the budget of training are two, each encoded as it is written."""
    write_run(tmp_path / "run")
    mask = ["data.text_mask.strategy=truncate", "data.text_mask.tokens=4"]
    (tmp_path / "run" / "config.yaml").write_text(config.dump(config.load("aclip-tiny", mask)))
    model = open_encoder(locate(str(tmp_path / "run")), "student", torch.device("cpu"))
    prompts = ["a photo of a small red car", "a photo of a small red house"]
    rows = model.text(prompts)
    assert isinstance(model, TowerEncoder) and not torch.allclose(rows[0], rows[1], atol=1e-3)
    torch.testing.assert_close(rows, model.towers.embed_texts(build_tokenizer()(prompts, 77)))


def test_every_rank_makes_the_same_number_of_forward_calls(tmp_path: Path) -> None:
    data = open_set(str(write_set(tmp_path / "set")))

    def work(comm):
        model, calls = tiny_encoder(), []
        towers = model.towers
        counted = SimpleNamespace(
            embed_images=lambda x: (calls.append(("image", len(x))), towers.embed_images(x))[1],
            embed_texts=lambda x: (calls.append(("text", len(x))), towers.embed_texts(x))[1],
        )
        model.towers = counted
        zero_shot.evaluate(model, data, 4, comm)
        return calls

    first, *others = run_threads(4, work)
    assert first and all(calls == first for calls in others)


def test_a_slice_a_rank_would_lose_or_double_samples(tmp_path: Path, monkeypatch) -> None:
    """The twin: dealing as a sampler that pads its end does, the embeddings are no longer the set's."""

    def padded(count: int, batch_size: int, comm) -> list[range]:
        share = -(-count // comm.world_size)
        start = min(comm.rank * share, count - share)
        return [range(n, min(n + batch_size, start + share)) for n in range(start, start + share, batch_size)]

    data, model = open_set(str(write_set(tmp_path / "set"))), tiny_encoder()
    alone = encode_images(model, data.samples, 4, SingleProcess())
    monkeypatch.setattr(encoding, "_deal", padded)
    found = run_threads(2, lambda comm: encode_images(model, data.samples, 4, comm))[0]
    assert not torch.equal(found, alone)


@pytest.mark.parametrize("fails", [False, True])
def test_its_readers_end_where_they_are_used(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to the garbage collector they are joined in any thread, and in one that starts, that never ends: a run hung
    in its evaluation."""
    kept, load_ahead, model = [], encoding._load_ahead, tiny_encoder()
    monkeypatch.setattr(encoding, "_load_ahead", lambda *words: kept.append(load_ahead(*words)) or kept[0])
    if fails:
        monkeypatch.setattr(model, "image", lambda batch, numbers: 1 / 0)
    samples = open_set(str(write_set(tmp_path / "set"))).samples
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        encode_images(model, samples, 4, SingleProcess())
    assert kept[0].gi_frame is None, "it is at its end"


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", num_shards=1)
    content = (folder / "test" / "0.tar").read_bytes()
    start = content.index(b"IHDR")
    (folder / "test" / "0.tar").write_bytes(content[:start] + b"XXXX" + content[start + 4 :])
    with pytest.raises(UserError, match=r"0\.tar: 0 cannot be read as an image"):
        encode_images(tiny_encoder(), open_set(str(folder)).samples, 4, SingleProcess())


def test_the_classifier_is_kept_and_is_the_mean_of_its_prompts(tmp_path: Path) -> None:
    data, model = open_set(str(write_set(tmp_path / "set"))), tiny_encoder()
    made = zero_shot.build_classifier(model, data.classnames, data.templates, 8, SingleProcess())
    assert zero_shot.build_classifier(model, data.classnames, data.templates, 8, SingleProcess()) is made
    for row, name in zip(made, data.classnames):
        parts = [model.text([template.replace("{c}", name)])[0] for template in data.templates]
        mean = torch.stack(parts).mean(0)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-6)


def test_progress_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amclip_ds.progress.REPORT_EVERY_S", 0.0)
    data, model, reported = open_set(str(write_set(tmp_path / "set"))), tiny_encoder(), []
    zero_shot.evaluate(model, data, 8, SingleProcess())
    model = tiny_encoder()
    model.say = reported.append
    zero_shot.evaluate(model, data, 8, SingleProcess())
    assert [line.split(",")[0] for line in reported] == [
        "student: texts: 8 of 10",
        "student: images: 8 of 21",
        "student: images: 16 of 21",
    ]


def test_the_runs_own_sets_are_the_default() -> None:
    from argparse import Namespace

    from amclip_ds import config
    from amclip_ds.evaluate.command import _specs_of
    from amclip_ds.evaluate.source import Located

    def of(settings: config.TrainConfig | None, data: list[str] | None) -> tuple[list[str], str]:
        return _specs_of(Namespace(data=data), Located(Path("run"), "run", ("student",), 1, None, settings), None)

    own = config.load("clip-tiny", ["eval.data=/a::/b", "data.train=x"])
    assert of(own, None) == (["/a", "/b"], "eval.data") and of(own, ["/c"]) == (["/c"], "--data")
    for settings in (None, config.load("clip-tiny", ["data.train=x"])):
        with pytest.raises(UserError, match="--data: name a data set"):
            of(settings, None)
