"""Synthetic scenes: equal bytes whatever makes them, every class, a box around the object, CLIP_benchmark's files."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amclip_ds.data import synthetic
from amclip_ds.data.synthetic import CLASSES, COLOURS, SHAPES, SceneConfig, make_scene, write_dataset
from amclip_ds.errors import AmclipError, UserError


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples_of(tar_path: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tar_path) as tar:
        for member in tar:
            key, suffix = member.name.split(".")
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(key, {})[suffix] = file.read()
    return samples


def test_bytes_do_not_depend_on_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "SCENES_PER_PROCESS", 1)
    write_dataset(tmp_path / "one", 70, 64, image_size=32, shard_size=20, workers=1)
    write_dataset(tmp_path / "two", 70, 64, image_size=32, shard_size=20, workers=2)
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert one == two
    assert [name for name in sorted(one) if name.startswith("train")] == [f"train/{n:05d}.tar" for n in range(4)]


def test_a_scene_depends_on_seed_split_and_number_alone(tmp_path: Path) -> None:
    write_dataset(tmp_path / "few", 5, 3, image_size=32)
    write_dataset(tmp_path / "many", 9, 7, image_size=32, shard_size=4)
    few, many = samples_of(tmp_path / "few/train/00000.tar"), samples_of(tmp_path / "many/train/00000.tar")
    assert few["000000003"] == many["000000003"]
    pictures = {
        make_scene(SceneConfig(32, seed), split, number).image.tobytes()
        for seed in (0, 1)
        for split in ("train", "test")
        for number in (0, 1)
    }
    assert len(pictures) == 8


def test_the_test_split_is_balanced_and_named_as_clip_benchmark_reads_it(tmp_path: Path) -> None:
    write_dataset(tmp_path / "scenes", 0, 2 * len(CLASSES), image_size=32, shard_size=50)
    test = tmp_path / "scenes" / "test"
    shards = [test / f"{number}.tar" for number in range(int((test / "nshards.txt").read_text()))]
    assert sorted(test.glob("*.tar")) == sorted(shards)
    names = (test.parent / "classnames.txt").read_text().splitlines()
    labels = Counter()
    for shard in shards:
        for members in samples_of(shard).values():
            label, fields = int(members["cls"]), json.loads(members["json"])
            labels[label] += 1
            assert names[label] == f"{fields['colour']} {fields['shape']}"
            assert members["txt"].decode() in fields["captions"]
            assert all(fields["shape"] in text and fields["colour"] in text for text in fields["captions"])
            assert len(set(fields["captions"])) == 6
            assert Image.open(io.BytesIO(members["jpg"])).size == (32, 32)
    assert labels == {label: 2 for label in range(len(SHAPES) * len(COLOURS))}
    assert len(set(names)) == 64
    templates = (test.parent / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert templates[0].format(c=names[0]) == "a photo of one red circle"
    assert (test.parent / "dataset_type.txt").read_text().strip() == "classification"


def test_training_classes_all_occur() -> None:
    labels = Counter(make_scene(SceneConfig(16), "train", number).label for number in range(640))
    assert len(labels) == 64 and max(labels.values()) < 30


@pytest.mark.parametrize("image_size", [16, 64, 225])
@pytest.mark.parametrize("label", range(0, 64, 3))
def test_the_box_is_the_smallest_around_the_object(
    image_size: int, label: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SceneConfig(image_size)
    scene = make_scene(config, "test", label)
    monkeypatch.setattr(synthetic, "draw_object", drawing_nothing(synthetic.draw_object))
    without = make_scene(config, "test", label)
    differ = np.argwhere((np.asarray(scene.image) != np.asarray(without.image)).any(-1))
    assert_smallest_around(differ, scene.box)
    top, left, height, width = scene.box
    assert max(height, width) <= 0.42 * image_size + 1
    for wrong in ((top, left + 2, height, width), (top - 2, left, height, width), (top, left, height + 2, width)):
        with pytest.raises(AssertionError):
            assert_smallest_around(differ, wrong)


def assert_smallest_around(pixels: np.ndarray, box: tuple[int, int, int, int]) -> None:
    """pixels: [n, 2] rows and columns; a smooth edge may leave its outermost pixel unchanged."""
    top, left, height, width = box
    first, last = pixels.min(0), pixels.max(0)
    assert (first >= (top, left)).all() and (last < (top + height, left + width)).all()
    assert first.tolist() == pytest.approx([top, left], abs=1)
    assert last.tolist() == pytest.approx([top + height - 1, left + width - 1], abs=1)


def drawing_nothing(draw):  # type: ignore[no-untyped-def]
    """draw_object on a copy: the same random numbers are drawn, the scene stays without its object."""
    return lambda random, image, *more: draw(random, image.copy(), *more)


def test_small_objects_are_a_choice_that_leaves_other_sets_as_they_were(tmp_path: Path) -> None:
    small, large = (synthetic.SceneConfig(64, small_objects=choice) for choice in (True, False))
    sides = {True: set[int](), False: set[int]()}
    for number in range(40):
        for scenes in (small, large):
            sides[scenes.small_objects].add(max(synthetic.make_scene(scenes, "train", number).box[2:]))
    assert max(sides[True]) <= 17 < max(sides[False]) <= 28
    write_dataset(tmp_path / "large", 4, 4)
    assert "small_objects" not in json.loads((tmp_path / "large" / "scenes.json").read_text())
    with pytest.raises(UserError):
        write_dataset(tmp_path / "large", 4, 4, small_objects=True)


def test_a_shape_has_its_own_outline() -> None:
    outlines = {synthetic.draw_stencil(shape, 24).tobytes() for shape in SHAPES}
    assert len(outlines) == len(SHAPES)


def test_colour_of_the_clutter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grey clutter leaves the object the only saturated thing; the control does not."""
    monkeypatch.setattr(synthetic, "draw_object", drawing_nothing(synthetic.draw_object))

    def saturation(config: SceneConfig) -> float:
        pictures = [np.asarray(make_scene(config, "train", n).image.convert("HSV"))[..., 1] for n in range(40)]
        return float(np.mean([np.percentile(picture, 99) for picture in pictures]))

    assert saturation(SceneConfig(64, coloured_distractors=True)) > 1.5 * saturation(SceneConfig(64))


def test_a_folder_is_never_written_over(tmp_path: Path) -> None:
    assert write_dataset(tmp_path / "scenes", 3, 3, image_size=16)
    before = files_of(tmp_path)
    assert not write_dataset(tmp_path / "scenes", 3, 3, image_size=16)
    with pytest.raises(UserError, match="--out .*scenes: holds something else"):
        write_dataset(tmp_path / "scenes", 4, 3, image_size=16)
    assert files_of(tmp_path) == before


def test_an_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "make_scene", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(AmclipError, match="No space left") as caught:
        write_dataset(tmp_path / "scenes", 3, 3)
    assert caught.value.exit_code == 1, "a full disk is the machine's fault"
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    with pytest.raises(UserError, match="--image-size"):
        write_dataset(tmp_path / "scenes", 3, 3, image_size=4)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out .*file"):
        write_dataset(tmp_path / "file", 3, 3)
    with pytest.raises(UserError, match="--out .*cannot be written"):
        write_dataset(tmp_path / "file" / "scenes", 3, 3)


def test_webdataset_writes_the_bytes_that_tarfile_does(tmp_path: Path) -> None:
    """Shards that were made before it wrote them stay what they are."""
    config = SceneConfig(32, 0, False)
    synthetic.write_shard(config, (tmp_path / "0.tar", "train", range(3, 6)))
    with tarfile.open(tmp_path / "1.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(3, 6):
            for suffix, content in synthetic.members_of(synthetic.make_scene(config, "train", number)):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert (tmp_path / "0.tar").read_bytes() == (tmp_path / "1.tar").read_bytes()
