"""Suites of sets by name: which sets they are, where they are, what is reported of each, and the averages.

    ROOT/wds_vtab-cifar10   ROOT/wds_vtab-cifar10_test   ROOT/vtab/cifar10   ROOT/cifar10        CLIP_benchmark's layout
    ROOT/winogavil                                                                               winogavil.py's
    CACHE/datasets--clip-benchmark--wds_vtab-cifar10/snapshots/REVISION                           the hub's cache

Lists and metrics are those of CLIP_benchmark 1.6.2 (vtab+, retrieval) and of DataComp (tasklist.yml and
aggregate_scores.py: datacomp, imagenet-shifts). An average is given only where all its sets were measured.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amclip_ds.errors import UserError
from amclip_ds.evaluate.datasets import ASSOCIATION, RETRIEVAL, EvalSet
from amclip_ds.evaluate.metrics import MEAN_AVERAGE_PRECISION
from amclip_ds.evaluate.set_names import GROUPED, known_name
from amclip_ds.evaluate.tasks import PROBES
from amclip_ds.files import not_written

RECALLS = ("image_retrieval_recall@5", "text_retrieval_recall@5")
MEAN_RECALL = "mean_recall@1"
PER_CLASS = "mean_per_class_recall"
JACCARD = "jaccard_score_10-12"
FEWEST_CANDIDATES = 10  # of the games that JACCARD is of
SHIFTS = ("imagenet_sketch", "imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r", "objectnet")


@dataclass(frozen=True)
class Suite:
    """Sets, by CLIP_benchmark's names, and what is reported of each."""

    metrics: Mapping[str, tuple[str, ...]]
    """set -> metrics"""
    averages: Mapping[str, tuple[str, ...]]
    """name of an average -> its sets; "": all"""


def _each(names: str, metric: str = "acc1") -> dict[str, tuple[str, ...]]:
    return {name: (metric,) for name in names.split()}


VTAB_PLUS = _each(
    "imagenet1k imagenetv2 imagenet_sketch imagenet-a imagenet-r objectnet fer2013 voc2007 sun397 cars fgvc_aircraft"
    " mnist stl10 gtsrb country211 renderedsst2 vtab/caltech101 vtab/cifar10 vtab/cifar100 vtab/clevr_count_all"
    " vtab/clevr_closest_object_distance vtab/diabetic_retinopathy vtab/dmlab vtab/dsprites_label_orientation"
    " vtab/dsprites_label_x_position vtab/dtd vtab/eurosat vtab/kitti_closest_vehicle_distance vtab/flowers vtab/pets"
    " vtab/pcam vtab/resisc45 vtab/smallnorb_label_azimuth vtab/smallnorb_label_elevation vtab/svhn"
) | _each("voc2007_multilabel", MEAN_AVERAGE_PRECISION)
DATACOMP = (
    _each(
        "vtab/cifar10 vtab/cifar100 vtab/clevr_count_all vtab/clevr_closest_object_distance country211 vtab/dtd"
        " vtab/eurosat food101 gtsrb imagenet1k imagenet_sketch imagenetv2 imagenet-a imagenet-o imagenet-r"
        " vtab/kitti_closest_vehicle_distance mnist objectnet voc2007 vtab/pcam renderedsst2 vtab/resisc45 cars stl10"
        " sun397 vtab/svhn wilds/camelyon17"
    )
    | _each("vtab/caltech101 fgvc_aircraft vtab/flowers vtab/pets", PER_CLASS)
    | _each("flickr30k mscoco_captions", MEAN_RECALL)
    | _each("wilds/iwildcam", "F1-macro_all")
    | _each("wilds/fmow", "acc_worst_region")
    | _each("dollar_street", "acc_top5_wg")
    | _each("geode", "acc_wg")
)
SUITES = {
    "vtab+": Suite(VTAB_PLUS, {"vtab+": ()}),
    "datacomp": Suite(
        DATACOMP | _each("winogavil", JACCARD),
        {
            "ImageNet": ("imagenet1k",),
            "ImageNet dist. shifts": SHIFTS,
            "VTAB": (
                "vtab/caltech101",
                "vtab/cifar100",
                "vtab/clevr_count_all",
                "vtab/clevr_closest_object_distance",
                "vtab/dtd",
                "vtab/eurosat",
                "vtab/kitti_closest_vehicle_distance",
                "vtab/flowers",
                "vtab/pets",
                "vtab/pcam",
                "vtab/resisc45",
                "vtab/svhn",
                "sun397",
            ),
            "Retrieval": ("flickr30k", "mscoco_captions", "winogavil"),
            "Average": (),
        },
    ),
    "imagenet-shifts": Suite(_each(" ".join(SHIFTS)), {"ImageNet dist. shifts": ()}),
    "retrieval": Suite({name: RECALLS for name in ("mscoco_captions", "flickr8k", "flickr30k")}, {"retrieval": ()}),
}


@dataclass(frozen=True)
class Found:
    """What of a suite is here."""

    suite: str
    folders: Mapping[str, Path]
    """set -> its folder"""
    missing: tuple[str, ...]

    def key_of(self, folder: str) -> str:
        """The set that a folder is: a row's name says less, since a folder may be a link, or a download's."""
        return next(key for key, path in self.folders.items() if str(path) == folder)

    def lines(self) -> list[str]:
        """For people."""
        suite = SUITES[self.suite]
        lines = [f"{self.suite}: {len(self.folders)} of {len(suite.metrics)} sets are here"]
        if self.missing:
            lines.append(f"not here: {', '.join(self.missing)}")
        return lines


def find(name: str, roots: Sequence[str]) -> Found:
    """Where the sets of a suite are; roots: folders, or none: the hub's cache. Raises UserError."""
    suite = SUITES[name]
    places = [Path(root).expanduser() for root in roots] or [_cache()]
    for place in places:
        if not place.is_dir():
            raise UserError(f"--suite {name}: {place}: no such folder; --data names the one that holds the sets")
    folders = {}
    for key in suite.metrics:
        found = {path.resolve(): path for place in places for path in _candidates(place, key)}
        if len(found) > 1:
            raise UserError(f"--suite {name}: {key} is here twice: {' and '.join(map(str, list(found.values())[:2]))}")
        if found:
            folders[key] = next(iter(found.values()))
    if not folders:
        wanted = ", ".join(f"wds_{key.replace('/', '-')}" for key in list(suite.metrics)[:3])
        raise UserError(f"--suite {name}: none of its sets is in {', '.join(map(str, places))} ({wanted}, ...)")
    return Found(name, folders, tuple(key for key in suite.metrics if key not in folders))


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _candidates(root: Path, key: str) -> Iterator[Path]:
    """The folders of a set below one root."""
    flat, bare = key.replace("/", "-"), key.rpartition("/")[2]
    packed = {f"wds_{name}{end}" for name in (flat, bare) for end in ("", "_test")}
    spellings = packed | {flat, bare, key}
    for spelling in sorted(spellings):
        if (root / spelling).is_dir():
            yield root / spelling
    for repository in sorted(root.glob("datasets--*--wds_*")):
        if repository.name.rpartition("--")[2] in packed:
            reference = repository / "refs" / "main"
            if reference.is_file():
                snapshot = repository / "snapshots" / reference.read_text().strip()
                if snapshot.is_dir():
                    yield snapshot


def check(found: Found, sets: Sequence[EvalSet]) -> None:
    """Refuses, before anything is evaluated, a set that cannot give what the suite reports of it. Raises UserError."""
    for data in sets:
        for metric in SUITES[found.suite].metrics[found.key_of(data.folder)]:
            if not _gives(data, metric):
                kind = "classification of several labels an image" if data.is_multilabel else data.task
                raise UserError(f"--suite {found.suite}: {data.folder} is a set for {kind}, which gives no {metric}")


def _gives(data: EvalSet, metric: str) -> bool:
    if data.task == RETRIEVAL:
        return metric in (*RECALLS, MEAN_RECALL)
    if data.task == ASSOCIATION:
        return metric == JACCARD and any(len(game.candidates) >= FEWEST_CANDIDATES for game in data.games)
    if data.is_multilabel:
        return metric == MEAN_AVERAGE_PRECISION
    worst, column, _ = GROUPED.get(known_name(data.name), ("", 0, 0))
    if metric == worst:
        return all(len(sample.numbers) > column for sample in data.samples)
    return metric not in (*RECALLS, MEAN_RECALL, JACCARD, MEAN_AVERAGE_PRECISION)


def report(found: Found, rows: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Adds to the rows of a suite what it reports of them, and returns its averages, one for each probe too, as lines.

    rows: (the folder that was evaluated, its row)
    """
    suite = SUITES[found.suite]
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    for folder, row in rows:
        key = found.key_of(folder)
        row["suite_dataset"] = f"wds/{key}"
        both = [row["metrics"].get(f"{side}_retrieval_recall@1") for side in ("text", "image")]
        if None not in both and MEAN_RECALL in suite.metrics[key]:
            row["metrics"][MEAN_RECALL] = 0.5 * (both[0] + both[1])
        row["main_metric"] = suite.metrics[key][0]
        for metric in suite.metrics[key]:
            column = metric if len(suite.metrics[key]) > 1 else "main metric"
            probe = row["task"] if row["task"] in PROBES else ""  # the other tasks are averaged together
            values.setdefault((row["weights"], probe, column), {})[key] = row["metrics"][metric]
    lines = []
    for (weights, probe, column), by_set in values.items():
        whose = f"{weights}, {probe}" if probe else weights
        for title, members in suite.averages.items():
            wanted = members or tuple(suite.metrics)
            lacking = [key for key in wanted if key not in by_set]
            mean = sum(by_set[key] for key in wanted if key in by_set) / len(wanted)
            reported = f"{mean:.4f}" if not lacking else f"none: {len(lacking)} of {len(wanted)} sets are missing"
            lines.append(f"{found.suite}, {whose}, {title}, {column}: {reported}")
    return lines


def write_csv(path: Path, rows: Sequence[dict[str, Any]], model: str) -> None:
    """CLIP_benchmark's table (`clip_benchmark build`). Raises UserError."""
    metrics = sorted({metric for row in rows for metric in row["metrics"]})
    heads = ["model_fullname", "dataset", "task", "model", "pretrained", "language"]
    try:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, [*heads, *metrics], restval="")
            table.writeheader()
            for row in rows:
                table.writerow(
                    {
                        "model_fullname": f"{model} {row['weights']}",
                        "dataset": row.get("suite_dataset", row["dataset"]),
                        "task": "zeroshot_retrieval" if row["task"] == "retrieval" else row["task"],
                        "model": model,
                        "pretrained": row["weights"],
                        "language": "en",
                        **row["metrics"],
                    }
                )
    except OSError as error:
        raise not_written(f"--csv {path}:", error) from None
