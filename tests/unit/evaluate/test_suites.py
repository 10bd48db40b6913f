"""Suites: found where they are; what CLIP_benchmark 1.6.2 counts from the same embeddings; averages; the table."""

import csv
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from huggingface_hub import constants
from sklearn.metrics import f1_score, roc_auc_score

from amclip_ds.cli import main
from amclip_ds.comm import SingleProcess
from amclip_ds.errors import UserError
from amclip_ds.evaluate import names, suites
from amclip_ds.evaluate.datasets import EvalSet, open_set
from amclip_ds.evaluate.encoder import TowerEncoder, encode_images
from amclip_ds.evaluate.tasks import PROBES, open_for, run_task
from tests.unit.evaluate.exports import write_run
from tests.unit.evaluate.test_encoder import SIZES, picture, tiny_encoder
from tests.unit.thread_ranks import run_threads

COUNT = 24
BATCH = 8


def png(number: int) -> bytes:
    content = io.BytesIO()
    picture(SIZES[number % len(SIZES)], number).save(content, "PNG")
    return content.getvalue()


def npy(values: list[int]) -> bytes:
    content = io.BytesIO()
    np.save(content, np.array(values))
    return content.getvalue()


def write(folder: Path, kind: str, classes: int, members: Any) -> Path:
    """A set in CLIP_benchmark's layout. members(number): suffix -> content beside the image."""
    (folder / "test").mkdir(parents=True)
    (folder / "dataset_type.txt").write_text(kind)
    if kind != "retrieval":
        (folder / "classnames.txt").write_text("".join(f"thing {n}\n" for n in range(classes)))
        (folder / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c} here\n")
    (folder / "test" / "nshards.txt").write_text("2")
    for shard in range(2):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for number in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
                for suffix, content in {"png": png(number), **members(number)}.items():
                    member = tarfile.TarInfo(f"s{number:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def label_of(number: int, classes: int) -> int:
    return (number * number + 3 * number) % 7 % classes  # not in equal shares


def labels(classes: int) -> Any:
    return lambda number: {"cls": b"%d" % label_of(number, classes)}


def with_groups(classes: int) -> Any:
    return lambda number: {"cls": b"%d" % label_of(number, classes), "npy": npy([number % 3, 2000 + number % 2, 1])}


def without_groups(number: int) -> dict[str, bytes]:
    return labels(6)(number) | {"npy": npy([])}


def captions(number: int) -> dict[str, bytes]:
    count = (1, 0, 7)[number % 3]
    return {"txt": "\n".join(f"caption {n} of {number}" for n in range(count)).encode()}


def several(number: int) -> dict[str, bytes]:
    return {"npy": npy([int((number + place) % (place + 2) == 0) for place in range(6)])}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets of different kinds, under the names that packagers give them."""
    folder = tmp_path_factory.mktemp("suites")
    write(folder / "wds_vtab-cifar10", "classification", 10, labels(10))
    write(folder / "wds_vtab-pets_test", "classification", 7, labels(7))
    write(folder / "vtab" / "pcam", "classification", 2, labels(2))
    write(folder / "wds_voc2007_multilabel", "multilabel", 6, several)
    write(folder / "wds_flickr30k", "retrieval", 0, captions)
    write(folder / "wds_wilds-iwildcam_test", "classification", 7, labels(7))
    write(folder / "wds_wilds-fmow_test", "classification", 7, with_groups(7))
    write(folder / "wds_dollar_street_test", "classification", 7, with_groups(7))
    write(folder / "wds_geode_test", "classification", 7, with_groups(7))
    return folder


@pytest.fixture(scope="module")
def encoder() -> TowerEncoder:
    return tiny_encoder()


class Loader(list):
    """A data loader of embeddings, as CLIP_benchmark asks one."""

    dataset = SimpleNamespace(classes=())


MODEL = SimpleNamespace(encode_image=lambda rows: rows, encode_text=lambda rows: rows)


def theirs(encoder: TowerEncoder, data: EvalSet) -> dict[str, float]:
    """CLIP_benchmark's numbers from our embeddings, its amp off."""
    rows = encode_images(encoder, data.samples, BATCH, SingleProcess()).split(BATCH)
    target = [sample.numbers or sample.label for sample in data.samples]
    loader = Loader(zip(rows, torch.tensor(target).split(BATCH)))
    loader.dataset = SimpleNamespace(classes=list(data.classnames))
    return zeroshot_classification.evaluate(
        MODEL, loader, encoder.text, list(data.classnames), list(data.templates), "cpu", amp=False
    )


def ours(encoder: TowerEncoder, data: EvalSet) -> dict[str, float]:
    return run_task(data.task, encoder, data, BATCH, SingleProcess())["metrics"]


@pytest.fixture(autouse=True)
def present_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP_benchmark takes `float` of an array of one number, which NumPy 2.4 no longer allows."""
    as_float = lambda value: float(value.item() if isinstance(value, np.ndarray) else value)  # noqa: E731
    monkeypatch.setattr(zeroshot_classification, "float", as_float, raising=False)


@pytest.mark.parametrize("name", ["wds_vtab-cifar10", "wds_vtab-pets_test", "vtab/pcam", "wds_voc2007_multilabel"])
def test_classification_is_clip_benchmarks_to_the_last_digit(root: Path, encoder: TowerEncoder, name: str) -> None:
    data = open_set(str(root / name))
    expected, found = theirs(encoder, data), ours(encoder, data)
    expected = {metric: value for metric, value in expected.items() if value == value}  # acc5 below 5 classes is NaN
    assert {metric: found[metric] for metric in expected} == expected
    assert 0 < expected[next(iter(expected))] < 1


def test_retrieval_with_0_1_and_7_captions_is_clip_benchmarks(root: Path, encoder: TowerEncoder) -> None:
    """Theirs is an fp32 mean, ours a fraction: the same fp32."""
    data = open_set(str(root / "wds_flickr30k"))
    assert sorted({len(sample.captions) for sample in data.samples}) == [0, 1, 7]
    rows = encode_images(encoder, data.samples, BATCH, SingleProcess()).split(BATCH)
    texts = [list(sample.captions) for sample in data.samples]
    loader = Loader(zip(rows, [texts[place : place + BATCH] for place in range(0, COUNT, BATCH)]))
    expected = zeroshot_retrieval.evaluate(MODEL, loader, encoder.text, "cpu", amp=False, recall_k_list=[1, 5, 10])
    found = ours(encoder, data)
    assert {name: float(np.float32(value)) for name, value in found.items()} == expected


def test_roc_auc_is_scikit_learns(root: Path, encoder: TowerEncoder) -> None:
    data = open_set(str(root / "vtab" / "pcam"))
    rows = encode_images(encoder, data.samples, BATCH, SingleProcess())
    classes = zeroshot_classification.zero_shot_classifier(
        MODEL, encoder.text, list(data.classnames), list(data.templates), "cpu", amp=False
    )
    expected = roc_auc_score(
        [sample.label for sample in data.samples], (100 * rows @ classes).double().softmax(1)[:, 1]
    )
    assert ours(encoder, data)["roc_auc"] == expected


def test_roc_auc_is_the_same_if_the_classes_change_places(root: Path, encoder: TowerEncoder) -> None:
    data = open_set(str(root / "vtab" / "pcam"))
    swapped = replace(
        data,
        classnames=data.classnames[::-1],
        samples=tuple(replace(sample, label=1 - sample.label) for sample in data.samples),
    )
    for task in (data.task, *PROBES):
        found = [
            run_task(task, encoder, one, BATCH, SingleProcess(), 0, train)["metrics"]["roc_auc"]
            for one, train in (
                (data, replace(data, samples=data.samples[::2])),
                (swapped, replace(swapped, samples=swapped.samples[::2])),
            )
        ]
        assert found[0] == pytest.approx(found[1], abs=1e-9) and found[0] != 0.5


def test_a_diverged_model_has_no_number(root: Path) -> None:
    """Of several labels, where NaN would be sorted first, and of the probes."""
    diverged = tiny_encoder()
    with torch.no_grad():
        diverged.towers.vision.norm.weight.fill_(float("nan"))
    several_labels, two = open_set(str(root / "wds_voc2007_multilabel")), open_set(str(root / "vtab" / "pcam"))
    for task, data in ((several_labels.task, several_labels), *((task, two) for task in PROBES)):
        with pytest.raises(UserError, match="embeddings of this set are not finite"):
            run_task(task, diverged, data, BATCH, SingleProcess(), 0, data)


def test_worst_groups_and_f1(root: Path, encoder: TowerEncoder) -> None:
    """By hand, from the predictions; group g of image n is n mod 3."""
    for name, metric, k in (
        ("wds_wilds-fmow_test", "acc_worst_region", 1),
        ("wds_geode_test", "acc_wg", 1),
        ("wds_dollar_street_test", "acc_top5_wg", 5),
    ):
        data = open_set(str(root / name))
        rows = encode_images(encoder, data.samples, BATCH, SingleProcess())
        classes = zeroshot_classification.zero_shot_classifier(
            MODEL, encoder.text, list(data.classnames), list(data.templates), "cpu", amp=False
        )
        best = (rows @ classes).topk(k).indices
        hits = [sample.label in best[n].tolist() for n, sample in enumerate(data.samples)]
        expected = min(np.mean(hits[group::3]) for group in range(3))
        assert ours(encoder, data)[metric] == expected
    data = open_set(str(root / "wds_wilds-iwildcam_test"))
    rows = encode_images(encoder, data.samples, BATCH, SingleProcess())
    predicted, targets = (rows @ classes).argmax(1), [sample.label for sample in data.samples]
    assert ours(encoder, data)["F1-macro_all"] == f1_score(
        targets, predicted, average="macro", labels=np.unique(targets)
    )


def test_the_numbers_do_not_depend_on_the_ranks(root: Path, encoder: TowerEncoder) -> None:
    for name in ("wds_voc2007_multilabel", "wds_flickr30k", "wds_wilds-fmow_test"):
        data = open_set(str(root / name))
        alone = ours(encoder, data)

        def on_rank(comm: Any, data: EvalSet = data) -> dict[str, float]:
            rank_encoder = TowerEncoder(encoder.towers, "student", 32, 77, torch.device("cpu"))
            return run_task(data.task, rank_encoder, data, BATCH, comm)["metrics"]

        assert run_threads(3, on_rank) == [alone] * 3


def test_a_suite_is_evaluated_by_its_name(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    words = ["eval", str(tmp_path / "run"), "--weights", "student", "--data", str(root)]
    assert (
        main([*words, "--suite", "datacomp", "--csv", str(tmp_path / "t.csv"), "--json", str(tmp_path / "t.json")]) == 0
    )
    printed = capsys.readouterr().out
    assert "datacomp: 8 of 38 sets are here" in printed and "winogavil" in printed
    assert "datacomp, student, Average, main metric: none: 30 of 38 sets are missing" in printed
    table = {row["dataset"]: row for row in csv.DictReader((tmp_path / "t.csv").open())}
    assert set(table) == {
        "wds/vtab/cifar10",
        "wds/vtab/pets",
        "wds/vtab/pcam",
        "wds/flickr30k",
        "wds/wilds/iwildcam",
        "wds/wilds/fmow",
        "wds/dollar_street",
        "wds/geode",
    }
    assert table["wds/flickr30k"]["task"] == "zeroshot_retrieval" and table["wds/flickr30k"]["mean_recall@1"]
    rows = {row["dataset"]: row for row in json.loads((tmp_path / "t.json").read_text())}
    assert rows["wds_vtab-pets_test"]["main_metric"] == "mean_per_class_recall"
    assert rows["wds_wilds-iwildcam_test"]["main_metric"] == "F1-macro_all"
    retrieval = rows["wds_flickr30k"]["metrics"]
    expected = 0.5 * (retrieval["text_retrieval_recall@1"] + retrieval["image_retrieval_recall@1"])
    assert retrieval["mean_recall@1"] == expected

    capsys.readouterr()
    assert main(["watch", str(tmp_path / "run"), "--suite", "retrieval", "--data", str(root / "nowhere")]) == 2
    assert "--suite retrieval: " in capsys.readouterr().err


def test_averages_are_of_whole_suites() -> None:
    found = suites.Found("imagenet-shifts", {name: Path(name) for name in suites.SHIFTS}, ())

    def rows(task: str, scale: float) -> list[tuple[str, dict[str, Any]]]:
        return [
            (name, {"task": task, "weights": "student", "metrics": {"acc1": n * scale}})
            for n, name in enumerate(suites.SHIFTS)
        ]

    shown, probed = rows("zeroshot_classification", 0.1), rows("knn", 0.2)
    line = "imagenet-shifts, student, ImageNet dist. shifts, main metric: 0.2500"
    assert suites.report(found, shown) == [line]
    assert "none: 1 of 6 sets are missing" in suites.report(found, shown[1:])[0]
    both = [line, "imagenet-shifts, student, knn, ImageNet dist. shifts, main metric: 0.5000"]
    assert suites.report(found, shown + probed) == both, "one task's numbers do not take the other's place"


def test_a_set_of_a_suite_may_be_a_link(root: Path, tmp_path: Path) -> None:
    """And goes by the link's name, which says what it is: the folder's own may say anything."""
    (tmp_path / "eval").mkdir()
    for name, target in (("wds_vtab-cifar10", "real-cifar"), ("wds_vtab-pets", "real-pets")):
        (root / (name if name.endswith("cifar10") else f"{name}_test")).rename(tmp_path / target)
        (tmp_path / "eval" / name).symlink_to(tmp_path / target)
    write_run(tmp_path / "run")
    words = ["eval", str(tmp_path / "run"), "--weights", "student", "--data", str(tmp_path / "eval")]
    try:
        assert main([*words, "--suite", "vtab+", "--json", str(tmp_path / "t.json")]) == 0
    finally:
        (tmp_path / "real-cifar").rename(root / "wds_vtab-cifar10")
        (tmp_path / "real-pets").rename(root / "wds_vtab-pets_test")
    rows = {row["dataset"]: row for row in json.loads((tmp_path / "t.json").read_text())}
    assert {name: row["suite_dataset"] for name, row in rows.items()} == {
        "wds_vtab-cifar10": "wds/vtab/cifar10",
        "wds_vtab-pets": "wds/vtab/pets",
    }
    assert len((tmp_path / "run" / "eval.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "name, kind, members, said",
    [
        ("wds_voc2007_multilabel", "classification", labels(6), "zeroshot_classification, which gives no mean_average"),
        ("wds_mnist", "multilabel", several, "classification of several labels an image, which gives no acc1"),
        ("wds_mnist", "retrieval", captions, "retrieval, which gives no acc1"),
        ("wds_geode", "classification", without_groups, "zeroshot_classification, which gives no acc_wg"),
    ],
)
def test_a_set_of_another_kind_is_refused_before_any_is_evaluated(
    name: str, kind: str, members: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_set.cache_clear()  # of a folder of the same name
    write(tmp_path / "eval" / name, kind, 6, members)
    write_run(tmp_path / "run")
    suite = "datacomp" if name == "wds_geode" else "vtab+"
    assert main(["eval", str(tmp_path / "run"), "--suite", suite, "--data", str(tmp_path / "eval")]) == 2
    printed = capsys.readouterr()
    assert f"{tmp_path}/eval/{name} is a set for {said}" in printed.err and not printed.out


def test_every_metric_of_a_suite_is_one_that_some_set_gives(root: Path) -> None:
    """What `check` lets through and what the evaluation gives are the same."""
    here = suites.find("datacomp", [str(root)])
    suites.check(here, [open_set(str(folder)) for folder in here.folders.values()])


@pytest.mark.parametrize("task", ["knn", "linear_probe"])
def test_a_probe_learns_one_label(root: Path, task: str) -> None:
    with pytest.raises(UserError, match=f"--task {task}: .*multilabel has several labels an image"):
        open_for(task, str(root / "wds_voc2007_multilabel"), "", "folder", "folder", "--data")


def test_sets_of_the_hubs_cache(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a download leaves them: files are links to blobs, the folder is called by a revision."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    home, revision = tmp_path / "datasets--clip-benchmark--wds_flickr30k", "1" * 40
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    for number, path in enumerate(sorted((root / "wds_flickr30k").rglob("*.*"))):
        (home / "blobs" / str(number)).write_bytes(path.read_bytes())
        link = home / "snapshots" / revision / path.relative_to(root / "wds_flickr30k")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(home / "blobs" / str(number))
    found = suites.find("retrieval", [])
    assert list(found.folders) == ["flickr30k"] and found.missing == ("mscoco_captions", "flickr8k")
    data = open_set(str(found.folders["flickr30k"]))
    assert data.name == "wds_flickr30k" and len(data) == COUNT


def test_what_is_unclear_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of its sets is in"):
        suites.find("vtab+", [str(tmp_path)])
    for name in ("wds_flickr30k", "flickr30k"):
        write(tmp_path / name, "retrieval", 0, captions)
    with pytest.raises(UserError, match="flickr30k is here twice"):
        suites.find("retrieval", [str(tmp_path)])
    write(tmp_path / "wds_geode", "classification", 7, labels(7))
    with pytest.raises(UserError, match="has no .npy, which this set needs"):
        open_set(str(tmp_path / "wds_geode"))
    write(tmp_path / "two", "multilabel", 6, lambda number: {"npy": npy([2] * 6)})
    with pytest.raises(UserError, match="holds other numbers than 0 and 1"):
        open_set(str(tmp_path / "two"))
    header = npy([1, 2]).replace(b"(2,)", b"(9999999999,)"[:4] + b"")
    for n, content in enumerate((b"no array", header[:-3], b"\x93NUMPY\x01\x00v\x00" + b"(" * 118)):
        write(tmp_path / f"bad{n}", "multilabel", 6, lambda number, content=content: {"npy": content})
        with pytest.raises(UserError, match="no list of whole numbers"):
            open_set(str(tmp_path / f"bad{n}"))


def test_names_and_prompts_of_an_installed_clip_benchmark(root: Path, tmp_path: Path) -> None:
    """Where a set's folder has none."""
    folder = write(tmp_path / "wds_mnist", "classification", 10, labels(10))
    (folder / "classnames.txt").unlink()
    (folder / "zeroshot_classification_templates.txt").unlink()
    data = open_set(str(folder))
    assert data.classnames[:2] == ("0", "1") and data.templates == ('a photo of the number: "{c}".',)
    assert names.of_clip_benchmark("classnames", "unheard of") == ()
