"""What is wrong with a set is one line that names the file."""

import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import amclip_ds  # noqa: F401  first: it prepares torchvision
from amclip_ds.comm import SingleProcess
from amclip_ds.errors import UserError
from amclip_ds.evaluate.datasets import open_set
from amclip_ds.evaluate.tasks import run_task
from tests.unit.data.shards import encode, write_tar
from tests.unit.data.test_images import OTHERS
from tests.unit.evaluate.test_encoder import picture, tiny_encoder, write_set


@pytest.fixture(autouse=True)
def fresh_sets() -> None:
    open_set.cache_clear()


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def empty_shard(folder: Path) -> None:
    tarfile.open(folder / "test" / "1.tar", "w").close()


def cut_shard(folder: Path) -> None:
    content = (folder / "test" / "1.tar").read_bytes()
    (folder / "test" / "1.tar").write_bytes(content[: len(content) // 2 - 100])


def no_label(folder: Path) -> None:
    with tarfile.open(folder / "test" / "1.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())


MISTAKES = [
    (remove("zeroshot_classification_templates.txt"), r"zeroshot_classification_templates\.txt: missing.*--templates"),
    (write("zeroshot_classification_templates.txt", "\n"), r"templates\.txt: empty"),
    (write("zeroshot_classification_templates.txt", "a photo"), r"templates\.txt: line 1: 'a photo' has no \{c\}"),
    (remove("classnames.txt"), r"classnames\.txt: missing"),
    (write("classnames.txt", "one\ntwo\nthree\n"), r"\.tar: .* has label 4, and there are 3 class names"),
    (remove("test/nshards.txt"), r"nshards\.txt: missing"),
    (write("test/nshards.txt", "many"), r"nshards\.txt: 'many' is not a number"),
    (write("test/nshards.txt", "9999999"), r"nshards\.txt: '9999999' is not a number"),
    (write("test/nshards.txt", "999999"), r"2\.tar: missing; .*nshards\.txt says 999999"),
    (write("test/nshards.txt", "\u0662"), r"nshards\.txt: '\u0662' is not a number"),
    (write("test/nshards.txt", "3"), r"2\.tar: missing; .*nshards\.txt says 3"),
    (write("dataset_type.txt", "segmentation"), r"'segmentation' is neither classification nor retrieval"),
    (empty_shard, r"1\.tar: an empty tar"),
    (cut_shard, r"1\.tar: damaged at byte"),
    (no_label, r"1\.tar: a has no label"),
]


@pytest.mark.parametrize(("spoil", "said"), MISTAKES, ids=[said[:30] for _, said in MISTAKES])
def test_a_mistake_is_named(spoil: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    spoil(folder)
    with pytest.raises(UserError) as caught:
        open_set(str(folder))
    assert re.search(said, str(caught.value)) and "\n" not in str(caught.value), caught.value


def test_a_set_in_order_opens(tmp_path: Path) -> None:
    data = open_set(str(write_set(tmp_path / "set")))
    assert data.task == "zeroshot_classification" and len(data) == 21 and data.name == "set"
    assert [sample.label for sample in data.samples][:3] == [0, 2, 4]
    assert data.samples[1].read().tobytes() == picture((144, 189), 2).tobytes()


def test_an_image_folder(tmp_path: Path) -> None:
    for name in ("red_cat", "dog"):
        (tmp_path / "animals" / name).mkdir(parents=True)
        picture((20, 30), 0).save(tmp_path / "animals" / name / "1.png")
    data = open_set(str(tmp_path / "animals"), templates="openai-7")
    assert data.classnames == ("dog", "red cat") and len(data.templates) == 7 and len(data) == 2
    assert all("{c}" in template for template in data.templates)
    assert open_set(str(tmp_path / "animals")) == data, "CLIP's 7 prompts, where the folder has none of its own"
    (tmp_path / "animals" / "empty").mkdir()
    with pytest.raises(UserError, match="empty: a class without images"):
        open_set(str(tmp_path / "animals"), templates="openai-80")


def test_what_is_wrong_with_an_options_file_is_that_options(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    with pytest.raises(UserError, match="^--templates: nope: missing; it holds one prompt a line"):
        open_set(str(folder), templates="nope")
    (tmp_path / "one.txt").write_text("cat\n")
    with pytest.raises(UserError, match="^--classnames: .* has label .*, and there are 1 class names"):
        open_set(str(folder), classnames=str(tmp_path / "one.txt"))
    (folder / "classnames.txt").write_text("cat\n")
    with pytest.raises(UserError, match="^--data: .* has label"):
        open_set(str(folder))


def test_imagenet_by_name(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    data = open_set(str(folder), classnames="imagenet", templates="openai-80")
    assert len(data.classnames) == 1000 and data.classnames[0] == "tench" and len(data.templates) == 80


def test_pairs_for_retrieval(shared_dir: Path) -> None:
    data = open_set(str(shared_dir / "data" / "openstax" / "test" / "00000.tar"))
    assert data.task == "retrieval" and len(data) == 200 and max(len(sample.captions) for sample in data.samples) > 1


def write_tar_set(folder: Path, images: list[bytes]) -> Path:
    """A classification set in CLIP_benchmark's layout, of these images and classes 0, 1, 0, ..."""
    write_set(folder, num_shards=1)
    members = {}
    for number, image in enumerate(images):
        members |= {f"{number}.jpg": image, f"{number}.cls": b"%d" % (number % 2)}
    write_tar(folder / "test" / "0.tar", members)
    return folder


@pytest.mark.parametrize(("content", "said"), OTHERS, ids=[said for _, said in OTHERS])
def test_no_decoder_but_ours_is_started(content: bytes, said: str, tmp_path: Path) -> None:
    """In a tar and in a folder, under any name."""
    folders = [write_tar_set(tmp_path / "tars", [content, content]), tmp_path / "images"]
    for place in ("a/1.png", "b/1.jpeg"):
        (folders[1] / place).parent.mkdir(parents=True)
        (folders[1] / place).write_bytes(content)
    for folder in folders:
        with pytest.raises(UserError, match=f"cannot be read as an image: {said}; JPEG, PNG, WebP are read"):
            for sample in open_set(str(folder), templates="openai-7").samples:
                sample.read()


def test_a_suite_is_opened_plain_and_the_rest_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(Image.new("RGBA", (20, 10), (0, 0, 0, 0)), "PNG", exif=exif)
    suite = open_set(str(write_tar_set(tmp_path / "suite", [content, content])))
    assert suite.images == "plain" and suite.samples[0].read().size == (20, 10)
    for name in ("a", "b"):
        (tmp_path / "ours" / name).mkdir(parents=True)
        (tmp_path / "ours" / name / "1.png").write_bytes(content)
    ours = open_set(str(tmp_path / "ours"), templates="openai-7")
    image = ours.samples[0].read()
    assert ours.images == "upright" and image.size == (10, 20) and image.getpixel((0, 0)) == (255, 255, 255)
    row = run_task(ours.task, tiny_encoder(), ours, 4, SingleProcess())
    assert row["images"] == "upright"


def test_a_line_without_breadth_is_not_blown_up(tmp_path: Path) -> None:
    """Its shorter side brought to 32 pixels, it would take gigabytes."""
    data = open_set(str(write_tar_set(tmp_path / "set", [encode(Image.new("L", (1, 1 << 17)), "PNG")] * 2)))
    with pytest.raises(UserError, match=r"0\.tar: 0: 1 x 131072 pixels cannot be resized"):
        run_task(data.task, tiny_encoder(), data, 4, SingleProcess())
