"""Image folders as the world makes them: understood and said, or refused; never guessed."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from amclip_ds import config, preconditions
from amclip_ds.comm import SingleProcess
from amclip_ds.errors import UserError
from amclip_ds.evaluate import names
from amclip_ds.evaluate.datasets import EvalSet, check_sets, open_set
from amclip_ds.evaluate.tasks import open_for, run_task
from amclip_ds.shards.inputs import check_foreign
from tests.unit.data.shards import jpeg, write_tar
from tests.unit.evaluate.test_encoder import tiny_encoder, write_set

PICTURE = jpeg()
WNIDS = ("n01440764", "n02102040", "n03888257")  # three of Imagenette
NAMES = ("tench", "English Springer Spaniel", "parachute")


@pytest.fixture(autouse=True)
def fresh_sets() -> None:
    open_set.cache_clear()


def make(root: Path, files: Sequence[str]) -> Path:
    """A folder with these files; images hold a picture."""
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PICTURE if path.suffix else b"")
    return root


def classes(*folders: str, count: int = 3) -> list[str]:
    return [f"{folder}/{n}.JPEG" for folder in folders for n in range(count)]


def refused(folder: Path, **options: str) -> str:
    with pytest.raises(UserError) as caught:
        open_set(str(folder), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def labels_of(data: EvalSet) -> dict[str, int]:
    return {f"{Path(sample.path).parent.name}/{sample.key}": sample.label for sample in data.samples}


def test_the_names_are_imagenets() -> None:
    known = names.imagenet()
    assert len(known) == 1000 and list(known)[0] == "n01440764" and list(known.values())[0] == "tench"
    assert [known[wnid] for wnid in WNIDS] == list(NAMES)
    assert known["n02124075"] == "Egyptian Mau" and known["n15075141"] == "toilet paper"


def test_a_root_with_val_and_wnids(tmp_path: Path) -> None:
    """The README's own words: eval.data=/lustre/me/imagenet. `val` is no class."""
    root = make(tmp_path / "imagenet", classes(*(f"val/{wnid}" for wnid in WNIDS), "train/n01440764"))
    data = open_set(str(root))
    assert data.classnames == NAMES and len(data) == 9 and data.name == "imagenet"
    assert data.describe() == (
        f"{root}: 3 classes: tench, English Springer Spaniel, parachute; 9 images; split val; openai-7 templates;"
        " images opened upright"
    )
    assert check_sets(str(root)) == [data.describe()] == check_sets(str(root), [str(root / "elsewhere.tar")])
    below = open_set(str(root / "val"))
    assert below.samples == data.samples and below.name == "imagenet_val"
    assert open_set(str(root), classnames="imagenet").classnames == tuple(names.imagenet().values())
    assert {sample.label for sample in open_set(str(root), classnames="imagenet").samples} == {0, 217, 701}


@pytest.mark.parametrize("split", ["test", "val", "validation", "Val", "dev"])
def test_splits_are_no_classes(split: str, tmp_path: Path) -> None:
    root = make(tmp_path / "pets", classes(f"{split}/cat", f"{split}/dog", "train/cat", "train/dog", "train/eel"))
    (root / "LICENSE").touch()
    data = open_set(str(root))
    assert data.classnames == ("cat", "dog") and len(data) == 6 and f"split {split}" in data.describe()
    assert open_set(str(root), split="train").classnames == ("cat", "dog", "eel")
    assert "has no split 'other'" in refused(root, split="other")


def test_test_comes_before_val(tmp_path: Path) -> None:
    root = make(tmp_path / "pets", classes("test/cat", "test/dog", "val/cat", "val/dog", "val/eel"))
    assert open_set(str(root)).classnames == ("cat", "dog")


REFUSED = [
    (classes("train/cat", "train/dog"), r"holds the training split 'train' alone"),
    (classes("val/cat", "val/dog", "cat", "dog"), r"'val' may be a split or a class beside 'cat', 'dog'"),
    (classes("test", "masks"), r"'test' may be a split or a class beside 'masks'"),
    (classes("val"), r"val: 3 images without labels: .*a line NAME,LABEL"),
    (classes("."), r"3 images without labels"),
    (classes("cat"), r"all 3 images are of one class, 'cat'"),
    (classes("val/n01440764"), r"all 3 images are of one class, 'tench'"),
    (classes("cat", count=1), r"one image alone"),
    (classes("ILSVRC/Data/CLS-LOC/val/n01440764"), r"holds 'ILSVRC' alone; name the folder that holds the classes"),
    (classes("clipart/cat", "clipart/dog", "real/cat"), r"'clipart' holds folders, not images"),
    ([*classes("cat", "dog"), "eel/notes"], r"eel: a class without images"),
    ([*classes("val/cat", "val/dog"), "val/eel/.hidden.jpg"], r"eel: a class without images"),
    (classes("0", "1", "10"), r"classnames\.txt: missing, and numbers are no names; .*--classnames FILE"),
    (classes("0", "1", "cat"), r"some classes are numbers \(0\), some are not"),
    (classes("n01440764", "cat"), r"some classes are wnids \(n01440764\), some are not \('cat'\)"),
    (classes("n01440764", "n00000001"), r"1 of 2 wnids are not of ImageNet's thousand \(n00000001\)"),
    (classes("a_cat", "a cat"), r"'a_cat' is 'a cat', as is 'a cat': two classes of one name"),
    (classes("Crane", "crane"), r"two classes of one name"),
    (classes("a\x1b[2Jcat", "dog"), r"has a control character in it"),
    (["readme"], r"neither tars nor images in it"),
]


@pytest.mark.parametrize(("files", "said"), REFUSED, ids=[said[:40] for _, said in REFUSED])
def test_what_is_not_understood_is_refused(files: list[str], said: str, tmp_path: Path) -> None:
    message = refused(make(tmp_path / "set", files))
    assert re.search(said, message) and message.startswith("--data: "), message


def test_hidden_files_are_not_there_and_loose_ones_are_counted(tmp_path: Path) -> None:
    more = [".DS_Store", "cat/._0.JPEG", ".ipynb_checkpoints/0.jpg", "__MACOSX/cat/0.jpg", "cat/Thumbs.db", "plot.png"]
    data = open_set(str(make(tmp_path / "set", [*classes("cat", "dog"), *more, "cat/more/9.webp"])))
    assert data.classnames == ("cat", "dog") and len(data) == 7
    assert "1 images outside of classes are left out" in data.describe()


def test_what_is_called_an_image_is_not_passed_over(tmp_path: Path) -> None:
    """A GIF among them is named, rather than measured without."""
    root = make(tmp_path / "set", [*classes("cat", "dog"), "cat/9.gif"])
    (root / "cat" / "9.gif").write_bytes(b"GIF89a")
    data = open_set(str(root))
    assert len(data) == 7
    with pytest.raises(UserError, match=r"cat/9\.gif cannot be read as an image: is a GIF"):
        for sample in data.samples:
            sample.read()


def test_numbers_are_labels_where_names_are_given(tmp_path: Path) -> None:
    """ImageNetV2: the folder 10 is label 10, though it comes before 2 by name."""
    root = make(tmp_path / "v2", classes("0", "1", "2", "10"))
    data = open_set(str(root), classnames="imagenet")
    assert labels_of(data)["10/0.JPEG"] == 10 and labels_of(data)["2/0.JPEG"] == 2 and len(data.classnames) == 1000
    assert "1000 classes (4 of them occur): tench, goldfish, great white shark, ...; 12 images" in data.describe()
    (root / "classnames.txt").write_text("".join(f"thing {n}\n" for n in range(11)))
    assert open_set(str(root)).classnames[10] == "thing 10"
    (root / "classnames.txt").write_text("a\nb\nc\nd\n")
    open_set.cache_clear()
    assert "there is a label 10, and 4 class names, of labels from 0" in refused(root)


def test_names_of_a_file_are_one_a_folder(tmp_path: Path) -> None:
    root = make(tmp_path / "set", classes("x1", "x2", "train"))
    (tmp_path / "names").write_text("cat\r\ndog \neel\n")
    assert "'train' may be a split" in refused(root)
    data = open_set(str(root), classnames=str(tmp_path / "names"))
    assert data.classnames == ("cat", "dog", "eel") and labels_of(data)["x1/0.JPEG"] == 1
    (tmp_path / "names").write_text("cat\ndog\n")
    open_set.cache_clear()
    assert "3 classes ('train', ...) and 2 class names" in refused(root, classnames=str(tmp_path / "names"))
    assert "neither wnids nor labels of ImageNet" in refused(
        make(tmp_path / "b", classes("x", "y")), classnames="imagenet"
    )


KAGGLE = "ImageId,PredictionString\n0,n01440764 1 2 3 4\n1,n02102040 1 2 3 4 n02102040 5 6 7 8\n2,n01440764 0 0 1 1\n"
TINY = "0.JPEG\tn02102040\t0\t1\t2\t3\n1.JPEG\tn01440764\t0\t1\t2\t3\n2.JPEG\tn02102040\t0\t1\t2\t3\n"
LISTS = [
    ("labels.csv", "0.JPEG,n01440764\n1.JPEG,n02102040\n2.JPEG,n01440764\n", NAMES[:2]),
    ("labels.csv", "filename,label\n0.JPEG,black_cat\n1.JPEG,dog\n2.JPEG,dog\n", ("black cat", "dog")),
    ("val.txt", "0.JPEG dog\n1.JPEG cat\n2.JPEG cat\n", ("cat", "dog")),
    ("LOC_val_solution.csv", KAGGLE, NAMES[:2]),
    ("val_annotations.txt", TINY, NAMES[:2]),
]


@pytest.mark.parametrize("where", ["", "val", "val/images"])
@pytest.mark.parametrize(("name", "content", "expected"), LISTS, ids=[name for name, *_ in LISTS])
def test_images_beside_a_list(name: str, content: str, expected: tuple[str, ...], where: str, tmp_path: Path) -> None:
    root = make(tmp_path / "set", classes(where or "."))
    (root / ("val" if where == "val/images" else "") / name).write_text("\ufeff" + content.replace("\n", "\r\n"))
    data = open_set(str(root))
    assert data.classnames == expected and len(data) == 3 and f"labels of {name}" in data.describe()
    if not where:
        check_foreign(str(root / name), "--data")  # as `amclip eval` and a run do first
        listed = open_set(str(root / name))
        assert [sample.path for sample in listed.samples] == [sample.path for sample in data.samples]
        assert [sample.label for sample in listed.samples] == [sample.label for sample in data.samples]


BAD_LISTS = [
    ("labels.csv", "0.JPEG,cat\n1.JPEG,dog\n", r"no label for 1 of 3 images, the first 2\.JPEG"),
    ("labels.csv", "0.JPEG,cat\n1.JPEG,dog\n2.JPEG,cat\n3.JPEG,cat\n", r"line 4 names '3\.JPEG', and .* holds no such"),
    ("labels.csv", "0.JPEG,cat\n1.JPEG,dog\n2.JPEG,cat\n0.JPEG,dog\n", r"line 4 names '0\.JPEG' a second time"),
    ("labels.csv", "0.JPEG,500,300,cat\n1.JPEG,400,200,dog\n2.JPEG,1,2,dog\n", r"line 1 is not NAME,LABEL"),
    ("labels.csv", "0.JPEG,3\n1.JPEG,1\n2.JPEG,0\n", r"numbers are no names"),
    ("ILSVRC2012_validation_ground_truth.txt", "490\n361\n171\n", r"3 images without labels"),
    (
        "labels.csv",
        "0.JPEG,cat\n../../etc/passwd,dog\n2.JPEG,cat\n1.JPEG,a\n",
        r"line 2 names '\.\./\.\./etc/passwd', and",
    ),
]


@pytest.mark.parametrize(("name", "content", "said"), BAD_LISTS, ids=[said[:30] for *_, said in BAD_LISTS])
def test_a_list_that_does_not_fit_is_refused(name: str, content: str, said: str, tmp_path: Path) -> None:
    root = make(tmp_path / "set", classes("."))
    (root / name).write_text(content)
    assert re.search(said, refused(root)), refused(root)


def test_two_lists_are_one_too_many(tmp_path: Path) -> None:
    root = make(tmp_path / "set", classes("."))
    for name in ("a.csv", "b.csv"):
        (root / name).write_text("0.JPEG,cat\n1.JPEG,dog\n2.JPEG,cat\n")
    assert "'a.csv', 'b.csv' may each hold the labels" in refused(root)


LINES = [
    ("a\n\nb\n", r"line 2 is blank"),
    ("a\n \t\nb", r"line 2 is blank"),
    ("\na\nb\n", r"line 1 is blank"),
    ("a\nb\nA \n", r"line 3 is 'A', as is line 1: two classes of one name"),
    ("0\ta\n1\tb\n", r"line 1: .* has a control character"),
    ("a\x85b\nc\n", r"line 1: .* has a control character"),
]


@pytest.mark.parametrize(("content", "said"), LINES, ids=[said[:30] for _, said in LINES])
@pytest.mark.parametrize("file", ["classnames.txt", "zeroshot_classification_templates.txt"])
def test_a_line_that_moves_the_others_is_named(file: str, content: str, said: str, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    (folder / file).write_text(content)
    if file.startswith("zeroshot"):
        content = content.replace("a", "a {c}").replace("b", "b {c}")
        (folder / file).write_text(content)
        if "two classes" in said:
            return
    assert re.search(f"{re.escape(file)}: {said}", refused(folder))


def test_ends_of_lines_and_marks_are_no_part_of_a_name(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    (folder / "classnames.txt").write_bytes("\ufeffone \r\ntwo\r\nthree\r\nfour\r\nfive\r\n\r\n".encode())
    assert open_set(str(folder)).classnames == ("one", "two", "three", "four", "five")


def test_one_class_in_a_tar_is_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", num_shards=1)
    write_tar(
        folder / "test" / "0.tar",
        {f"{n}.{end}": data for n in range(3) for end, data in (("jpg", PICTURE), ("cls", b"2"))},
    )
    assert "all 3 images are of one class, 'thing 2'" in refused(folder)
    pair = write_tar(tmp_path / "0.tar", {"a.jpg": PICTURE, "a.txt": b"words"})
    assert "one image alone" in refused(pair)
    bare = write_tar(tmp_path / "1.tar", {"a.jpg": PICTURE, "a.txt": b"words", "b.jpg": PICTURE, "b.txt": b" \n"})
    assert "b has no caption" in refused(bare)


def test_tars_of_the_training_split_are_not_measured_on(tmp_path: Path) -> None:
    """Without dataset_type.txt, all tars below the folder were taken together."""
    pairs = {f"{n}.{end}": data for n in range(3) for end, data in (("jpg", PICTURE), ("txt", b"words"))}
    for split in ("train", "val"):
        (tmp_path / "set" / split).mkdir(parents=True)
        write_tar(tmp_path / "set" / split / "0.tar", pairs)
    assert len(open_set(str(tmp_path / "set"))) == 3
    assert "has no split 'test', but 'train', 'val'" in refused(tmp_path / "set", split="test")


def test_a_probe_needs_two_splits(tmp_path: Path) -> None:
    root = make(tmp_path / "pets", classes("cat", "dog"))
    with pytest.raises(UserError, match="has no split 'train'"):
        open_for("knn", str(root), "", "folder", "folder", "--data")


def test_links_lead_nowhere(tmp_path: Path) -> None:
    """Names are printed and written, so no link may say whose they are; but a cache's view of itself is a set."""
    (tmp_path / "secret").write_text("".join(f"line {n}\n" for n in range(5)))
    for name in ("classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt", "test/nshards.txt"):
        folder = write_set(tmp_path / name.replace("/", "-"))
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "secret")
        assert "a link that leads out of" in refused(folder) and "line 0" not in refused(folder)
    blobs, view = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    write_set(view)
    for number, file in enumerate(path for path in sorted(view.rglob("*")) if path.is_file()):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert len(open_set(str(view))) == 21


def test_a_set_is_called_by_the_name_it_is_reached_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "deep" / "below").mkdir(parents=True)

    def name_in(place: str, spec: str) -> str:
        monkeypatch.chdir(tmp_path / place)
        open_set.cache_clear()
        return open_set(spec).name

    assert name_in(".", "link") == name_in("deep", "../link") == name_in(".", "link/../link/.") == "link"
    assert name_in("real", ".") == name_in("real/test", "..") == "real"
    shutil.copy(tmp_path / "real" / "classnames.txt", tmp_path / "real" / "test")
    shutil.copy(tmp_path / "real" / "zeroshot_classification_templates.txt", tmp_path / "real" / "test")
    assert name_in(".", "link/test") == "link_test" and name_in("real", "test") == "real_test"
    assert name_in("deep/below", "../../real/test") == name_in("real/test", "../test") == "real_test"


def test_what_is_no_file_does_not_block(tmp_path: Path) -> None:
    root = make(tmp_path / "set", classes("cat", "dog"))
    os.mkfifo(root / "cat" / "9.jpg")
    assert "9.jpg: not an ordinary file" in refused(root)
    (root / "cat" / "9.jpg").unlink()
    (root / "cat" / "9.jpg").symlink_to("/nowhere")
    assert "9.jpg: not an ordinary file" in refused(root)
    (root / "cat" / "9.jpg").unlink()
    (root / "eel").symlink_to(root)
    assert "'eel' holds folders" in refused(root)


def test_what_can_be_known_at_the_start_is(tmp_path: Path) -> None:
    good = write_set(tmp_path / "good")
    bad = write_set(tmp_path / "bad")
    (bad / "zeroshot_classification_templates.txt").unlink()
    with pytest.raises(UserError, match="^eval.data: .*templates.txt: missing") as caught:
        check_sets(f"{good}::{bad}")
    assert "--templates" not in str(caught.value), "no option of training"
    broken = make(tmp_path / "broken", classes("cat", "dog"))
    (broken / "cat" / "0.JPEG").write_bytes(b"%!PS")
    with pytest.raises(UserError, match="^eval.data: .*is PostScript"):
        check_sets(str(broken))
    write_set(tmp_path / "other" / "good")
    with pytest.raises(UserError, match="are both called good"):
        check_sets(f"{good}::{tmp_path}/other/good")
    (tmp_path / "better").symlink_to(tmp_path / "other" / "good")
    assert len(check_sets(f"{good}::{tmp_path}/better")) == 2, "as the message says, a link does"
    assert len(check_sets(f"{good}::{good}")) == 1
    with pytest.raises(UserError, match="^eval.data: .*no such"):
        check_sets(str(tmp_path / "nowhere"))


def test_a_mistake_in_eval_data_ends_a_start_and_no_run_that_continues(tmp_path: Path) -> None:
    pairs = {f"{n}.{end}": data for n in range(3) for end, data in (("jpg", PICTURE), ("txt", b"words"))}
    bad = make(tmp_path / "imagenet", classes("val"))
    run, shard = tmp_path / "run", write_tar(tmp_path / "0.tar", pairs)
    made = config.load("clip-tiny", [f"data.train={shard}", f"run.out={run}", f"eval.data={bad}", "run.steps=4"])
    with pytest.raises(UserError, match="^eval.data: .*3 images without labels"):
        preconditions.check(made)
    (run / "checkpoints" / "step_00000002").mkdir(parents=True)
    preconditions.check(made)


def test_two_classes_of_one_name_keep_their_counts(tmp_path: Path) -> None:
    root = make(tmp_path / "both", classes("n03773504", "n04008634"))  # both are called missile
    assert "two classes of one name" in refused(root)
    data = open_set(str(root), classnames="imagenet")
    row = run_task(data.task, tiny_encoder(), data, 64, SingleProcess())
    assert sum(total for _, total in row["per_class"].values()) == 6 and len(row["per_class"]) == 1000


@pytest.mark.parametrize(
    "files, said",
    [
        (
            ["cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/test_batch"],
            "CIFAR's pickles, which are never loaded",
        ),
        (["cifar-100-python/meta", "cifar-100-python/test"], "CIFAR's pickles, which are never loaded"),
        (["raw/t10k-images-idx3-ubyte"], "the files of MNIST"),
        (["test_32x32.mat"], "files of Matlab"),
        (["readme.md"], "neither tars nor images in it"),
    ],
)
def test_other_forms_of_public_sets_are_refused_by_name(tmp_path: Path, files: list[str], said: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=said):
        open_set(str(tmp_path))
