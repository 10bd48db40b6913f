"""WinoGAViL: read from its table, scored as DataComp's evaluation does, and with it DataComp's average over 38 sets."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from amclip_ds.cli import main
from amclip_ds.comm import SingleProcess
from amclip_ds.errors import UserError
from amclip_ds.evaluate import suites
from amclip_ds.evaluate.association import jaccard
from amclip_ds.evaluate.datasets import ASSOCIATION, open_set
from amclip_ds.evaluate.encoder import TowerEncoder, encode_images
from amclip_ds.evaluate.set_names import GROUPED, known_name
from amclip_ds.evaluate.tasks import run_task
from amclip_ds.evaluate.winogavil import Game
from tests.unit.evaluate.exports import write_run
from tests.unit.evaluate.test_encoder import SIZES, picture, tiny_encoder
from tests.unit.evaluate.test_suites import BATCH, captions, labels, with_groups, write
from tests.unit.thread_ranks import run_threads

NAMES = [*(f"thing {n}" for n in range(10)), "t-shirt", "gif", "tea party", "ash"]
CUES = ("bald", "Orange", "west", "ice", "game", "Unit", "diagonal", "grain")


def games(count: int = 24) -> list[dict[str, Any]]:
    """Games of 5, 6, 10 and 12 candidates, 2 or 3 of them associated."""
    found = []
    for number in range(count):
        draw = np.random.default_rng(number)
        chosen = [NAMES[n] for n in draw.permutation(len(NAMES))[: (5, 6, 10, 12)[number % 4]]]
        associated = [chosen[n] for n in sorted(draw.permutation(len(chosen))[: 2 + number % 2])]
        found.append({"cue": CUES[number % len(CUES)], "candidates": chosen, "associations": associated})
    return found


def write_games(folder: Path, rows: list[dict[str, Any]], pictures: str = "winogavil_images") -> Path:
    """The layout of the data set's own repository: pandas' csv, lists as JSON, a picture for each name."""
    (folder / pictures).mkdir(parents=True)
    with (folder / "winogavil_dataset.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["", "candidates", "cue", "associations", "num_candidates"])
        for number, row in enumerate(rows):
            candidates, associations = json.dumps(row["candidates"]), json.dumps(row["associations"])
            table.writerow([number, candidates, row["cue"], associations, len(row["candidates"])])
    for number, name in enumerate(NAMES):
        picture(SIZES[number % len(SIZES)], number).save(folder / pictures / f"{name}.{('png', 'jpg')[number % 2]}")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_games(tmp_path_factory.mktemp("eval") / "winogavil", games())


@pytest.fixture(scope="module")
def encoder() -> TowerEncoder:
    return tiny_encoder()


def test_it_is_scored_as_datacomp_does(folder: Path, encoder: TowerEncoder) -> None:
    """From the same embeddings: each game on its own, the last of an ascending sort, scikit-learn's index."""
    data = open_set(str(folder))
    assert data.task == ASSOCIATION and "24 cues, 14 images" in data.describe()
    embeddings = dict(zip([s.key.rpartition(".")[0] for s in data.samples], _embed(encoder, data)))
    scores, sizes = [], []
    for game in games():
        cue = game["cue"].lower()
        text = encoder.text([f"An {cue}" if cue[0] in "aeiou" else f"A {cue}"])[0]
        cosines = np.array([float(text @ embeddings[name]) for name in game["candidates"]])
        is_associated = np.isin(game["candidates"], game["associations"])
        nearest = np.argsort(cosines)[-is_associated.sum() :]
        scores.append(jaccard_score(is_associated, np.isin(np.arange(len(cosines)), nearest)))
        sizes.append(len(cosines))
    by_size, all_scores = np.array(sizes), np.array(scores)
    expected = {
        "avg_jaccard_score": all_scores.mean(),
        "jaccard_score_5": all_scores[by_size == 5].mean(),
        "jaccard_score_6": all_scores[by_size == 6].mean(),
        "jaccard_score_10": all_scores[by_size == 10].mean(),
        "jaccard_score_12": all_scores[by_size == 12].mean(),
        "jaccard_score_5-6": all_scores[by_size <= 6].mean(),
        "jaccard_score_10-12": all_scores[by_size >= 10].mean(),
    }
    row = run_task(data.task, encoder, data, BATCH, SingleProcess())
    assert row["metrics"] == expected and 0 < expected["avg_jaccard_score"] < 1
    assert row["main_metric"] == "jaccard_score_10-12" and row["num_samples"] == 24
    low, high = row["intervals"]["avg_jaccard_score"]
    assert low < expected["avg_jaccard_score"] < high


def _embed(encoder: TowerEncoder, data: Any) -> torch.Tensor:
    return encode_images(encoder, data.samples, BATCH, SingleProcess())


def test_the_numbers_do_not_depend_on_the_ranks(folder: Path, encoder: TowerEncoder) -> None:
    data = open_set(str(folder))
    alone = run_task(data.task, encoder, data, BATCH, SingleProcess())

    def on_rank(comm: Any) -> dict[str, Any]:
        return run_task(
            data.task, TowerEncoder(encoder.towers, "student", 32, 77, torch.device("cpu")), data, BATCH, comm
        )

    assert run_threads(3, on_rank) == [alone] * 3


def test_equal_cosines_are_ranked_by_place_and_nan_is_no_number() -> None:
    game = [Game("ash", (0, 1, 2), (False, True, True))]
    images, text = torch.ones(3, 4), [torch.ones(4)]
    assert jaccard(images, text, game).tolist() == [1 / 3]  # chosen: 0 and 1; both chose 1, and either 0, 1, 2
    images[2] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        jaccard(images, text, game)


GOOD = {"cue": "bald", "candidates": ["ash", "gif", "t-shirt"], "associations": ["ash"]}


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"cue": " "}, "game 2 has no cue"),
        ({"candidates": ["ash", "owl"]}, "names 'owl', and .* holds no such image"),
        ({"candidates": ["ash", "../ash"]}, "holds no such image"),
        ({"candidates": ["ash", "ash"]}, "candidates holds 2 names, 1 different"),
        ({"associations": []}, "associations holds 0 names"),
        ({"associations": ["thing 1"]}, "'thing 1' is associated and no candidate"),
        ({"associations": "ash"}, "no list of names in JSON"),
        ({"associations": [1]}, "no list of names in JSON"),
    ],
    ids=str,
)
def test_a_game_that_cannot_be_scored_is_refused(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    write_games(tmp_path / "w", [GOOD, GOOD | wrong])
    with pytest.raises(UserError, match=said):
        open_set(str(tmp_path / "w"))


def test_other_places_and_what_is_missing(tmp_path: Path, encoder: TowerEncoder) -> None:
    for number, pictures in enumerate(("images", ".")):
        assert len(open_set(str(write_games(tmp_path / str(number), [GOOD], pictures))).games) == 1
    few = open_set(str(tmp_path / "0"))
    assert run_task(few.task, encoder, few, BATCH, SingleProcess())["metrics"].keys() == {
        "avg_jaccard_score",
        "jaccard_score_5-6",
    }
    with pytest.raises(UserError, match="a set for association"):
        run_task("zeroshot_classification", encoder, few, BATCH, SingleProcess())
    with pytest.raises(UserError, match="no winogavil_dataset.csv in it"):
        open_set(str(tmp_path), task=ASSOCIATION)
    packed = write_games(tmp_path / "packed", [GOOD], "elsewhere/still")
    with pytest.raises(UserError, match="no images; they belong into .*winogavil_images"):
        open_set(str(packed))
    (packed / "winogavil_images.zip").touch()
    with pytest.raises(UserError, match="winogavil_images.zip is still packed: unzip it there"):
        open_set(str(packed))


def test_datacomps_average_is_that_of_38_main_metrics() -> None:
    suite = suites.SUITES["datacomp"]
    found = suites.Found("datacomp", {name: Path(name) for name in suite.metrics}, ())
    rows = [
        (name, {"task": "any", "weights": "student", "metrics": {metric: number / 37}})
        for number, (name, (metric,)) in enumerate(suite.metrics.items())
        if metric != "mean_recall@1"
    ]
    recalls = {"text_retrieval_recall@1": 0.25, "image_retrieval_recall@1": 0.75}
    rows += [
        (name, {"task": "retrieval", "weights": "student", "metrics": dict(recalls)})
        for name in ("flickr30k", "mscoco_captions")
    ]
    expected = np.mean([row["metrics"].get(suite.metrics[name][0], 0.5) for name, row in rows])
    assert len(rows) == 38
    assert f"datacomp, student, Average, main metric: {expected:.4f}" in suites.report(found, rows)
    assert "none: 1 of 38 sets are missing" in suites.report(found, rows[1:])[-1]


@pytest.mark.nightly
def test_datacomps_average_is_given_over_all_38_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Miniatures of all 38, by one command: the averages are those of the main metrics, by hand."""
    root = tmp_path / "eval"
    write_games(root / "winogavil", games())
    for key in suites.DATACOMP:
        name = root / f"wds_{key.replace('/', '-')}_test"
        if key in ("flickr30k", "mscoco_captions"):
            write(name, "retrieval", 0, captions)
        else:
            write(name, "classification", 6, with_groups(6) if known_name(key) in GROUPED else labels(6))
    write_run(tmp_path / "run")
    words = ["eval", str(tmp_path / "run"), "--suite", "datacomp", "--data", str(root), "--weights", "student"]
    assert main([*words, "--json", str(tmp_path / "t.json"), "--csv", str(tmp_path / "t.csv")]) == 0
    printed = capsys.readouterr().out
    assert "datacomp: 38 of 38 sets are here" in printed and "missing" not in printed and "not here" not in printed
    rows = {row["dataset"]: row for row in json.loads((tmp_path / "t.json").read_text())}
    assert len(rows) == 38 == len(list(csv.DictReader((tmp_path / "t.csv").open())))
    main_metrics = {name: row["metrics"][row["main_metric"]] for name, row in rows.items()}
    assert f"datacomp, student, Average, main metric: {np.mean(list(main_metrics.values())):.4f}" in printed
    three = [main_metrics[name] for name in ("winogavil", "wds_flickr30k_test", "wds_mscoco_captions_test")]
    assert f"datacomp, student, Retrieval, main metric: {np.mean(three):.4f}" in printed
