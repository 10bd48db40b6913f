"""The study's grid (benchmarks/study.py): every run of it can be set up, and the table says what is missing."""

import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from amclip_ds import config
from amclip_ds.compare.runs import Run, make_runs, read_rows
from amclip_ds.evaluate import datasets
from benchmarks import study
from tests.unit.compare.test_compare import write_run


@pytest.mark.slow
def test_the_grid_is_whole_and_every_row_can_run(tmp_path: Path) -> None:
    runs = list(study.grid([], []))
    assert len(list(study.grid(["photographs"], []))) == 2 * 6 == len(list(study.grid(["keep0.5-photographs"], []))) * 2
    assert len(runs) == 8 * 6 + 9 + 3 and len({(cell.name, name) for cell, name, _ in runs}) == len(runs)
    (tmp_path / "words.json").write_text("{}")
    kept = {}
    for cell, name, row in runs:
        loaded = config.load(study.recipe_file(tmp_path, cell, name, row, tmp_path / "words.json"), ["data.train=x"])
        kept[cell.name, name] = loaded.mask.keep_ratio
        if row.masked:
            assert loaded.mask.keep_ratio == cell.keep_ratio, (cell.name, name)
    assert kept["keep0.25-small-grey", "random2x"] == 0.25 and kept["keep0.25-small-grey", "clip"] == 1.0


def test_what_was_not_run_is_listed(tmp_path: Path) -> None:
    assert [name for _, name, _ in study.grid(["base"], ["clip", "slip"])] == ["clip", "slip"]
    text = study.table(tmp_path, 900)
    assert "0 of 180 runs. Not run: keep0.5-large-grey clip 0, " in text and len(text.splitlines()) == 4
    assert study.spread([12.3]) == "12.3" and study.spread([]) == ""


def test_a_stop_ends_the_study_and_its_table_has_every_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def stopped(out: Path, cell: study.Cell, *rest: object) -> int:
        begun.append(cell.name)
        return 75 if len(begun) == 2 else 1  # runs failed in the first, the second was stopped

    monkeypatch.setattr(study, "run_cell", stopped)
    monkeypatch.setattr("sys.argv", ["study", "run", str(tmp_path), "--seeds", "5"])
    assert study.main() == 75 and begun == [cell.name for cell in study.CELLS[:2]]
    for seed in range(5):
        write_ended(tmp_path / "keep0.5-large-grey" / "runs" / f"random2x-seed{seed}", 40.0, 900)
    assert "| random2x | 0, 1, 2, 3, 4 |" in study.table(tmp_path, 900, seeds=5)
    assert study.table(tmp_path, 900, seeds=5).split("\n")[-1].startswith("5 of 300 runs.")


def test_a_row_without_a_mask_is_trained_once_for_both_kept_fractions(tmp_path: Path) -> None:
    half, quarter = study.CELLS[0], study.CELLS[4]
    assert (half.name, quarter.name) == ("keep0.5-large-grey", "keep0.25-large-grey")

    def runs_of(cell: study.Cell) -> list[Run]:
        rows = {name: study.ROWS[name] for name in ("clip", "random2x")}
        recipes = [study.recipe_file(tmp_path, cell, name, row, tmp_path / "t") for name, row in rows.items()]
        words = ["data.train=x.tar", "eval.data=y", "batch.global_size=64"]
        steps = dict.fromkeys(rows, 100)
        return make_runs(read_rows(recipes, words, [], 1), 2, steps, words, tmp_path / cell.name / "runs")

    for run in runs_of(half):
        write_run(run, 0.4, 1.0, code=run.seed)  # seed 1 failed
    runs = runs_of(quarter)
    runs[0].folder.parent.mkdir(parents=True)
    study.link_unmasked(tmp_path, quarter, runs)
    assert [path.name for path in runs[0].folder.parent.iterdir()] == ["clip-seed0"]
    assert study.read_outcome(runs[0]).metrics == {"acc1": 0.4} and not study.read_outcome(runs[1]).is_whole
    study.link_unmasked(tmp_path, quarter, runs)  # again: nothing new
    small = runs_of(study.CELLS[6])  # other scenes: no run of these is theirs
    study.link_unmasked(tmp_path, study.CELLS[6], small)
    assert not any(run.folder.exists() for run in small) and runs[0].folder.readlink().parts[-1] == "clip-seed0"


@pytest.mark.slow
def test_photographs_are_packed_mixed_with_prompts_as_captions(tmp_path: Path) -> None:
    for part, count in (("train", 20), ("test", 3)):
        for name, colour in (("cat", "red"), ("dog", "blue")):
            (tmp_path / "source" / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), colour).save(tmp_path / "source" / part / name / f"{number:04d}.jpg")
    cell = study.PHOTOGRAPHS[0]
    with pytest.raises(SystemExit, match="--source"):
        study.images_of(tmp_path / "out", cell, tmp_path)
    folder = study.images_of(tmp_path / "out", cell, tmp_path / "source")
    assert study.images_of(tmp_path / "out", study.PHOTOGRAPHS[1], None) == folder  # once
    (shard,) = (folder / "train").glob("*.tar")
    with tarfile.open(shard) as tar:
        captions = [tar.extractfile(member).read().decode() for member in tar if member.name.endswith(".txt")]
    named = [next(name for name in ("cat", "dog") if name in caption) for caption in captions]
    assert named.count("cat") == 20 and named[:20].count("cat") not in (0, 20)
    assert captions[0] == f"itap of a {named[0]}." and captions[1] == f"a bad photo of the {named[1]}."
    dataset = datasets.open_set(str(folder / "test"))
    assert dataset.classnames == ("cat", "dog") and len(dataset.samples) == 6
    words = study.words_of_all(cell, folder)
    assert f"eval.data={folder}/test" in words and not any("keep_colours" in word for word in words)
    assert "data.keep_colours=true" in study.words_of_all(study.BASE, folder)


def write_ended(folder: Path, accuracy: float, steps: int, code: int = 0) -> None:
    """A run's records: half of its accuracy at half of its steps, the teacher one point above."""
    (folder / "pictures").mkdir(parents=True)
    (folder / "exit.json").write_text(json.dumps({"code": code}))
    rows = [
        {"step": step, "weights": weights, "metrics": {"acc1": (accuracy + more) * step / steps / 100}}
        for step in (steps // 2, steps)
        for weights, more in (("student", 0), ("teacher", 1))
    ]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": steps, "tflops": 0.5, "step_s": 0.02, "mask_overlap": 0.4})
    )
    (folder / "pictures" / "masks.jsonl").write_text(json.dumps({"step": steps, "kept": [], "object_share": 0.9}))


def test_the_table_is_of_whole_runs_compared_seed_by_seed_and_at_equal_time(tmp_path: Path) -> None:
    for name, accuracies in {"random2x": (40.0, 44.0), "attentive2x": (50.0, 52.0, 54.0)}.items():
        for seed, accuracy in enumerate(accuracies):
            write_ended(tmp_path / "keep0.5-large-grey" / "runs" / f"{name}-seed{seed}", accuracy, 900)
    write_ended(tmp_path / "keep0.5-large-grey" / "runs" / "clip-seed0", 60.0, 900, code=1)  # failed
    write_ended(tmp_path / "keep0.5-large-grey" / "runs" / "aclip-seed0", 60.0, 100)  # of another length
    (tmp_path / "times.json").write_text(json.dumps([[0.5, "random2x", 0.1], [0.5, "attentive2x", 0.2]]))
    lines = study.table(tmp_path, 900).splitlines()
    assert lines[2].startswith(
        "| keep0.5-large-grey | random2x | 0, 1 | 20.0, 22.0 | 40.0, 44.0 | 42.0 ± 2.0 |  | 43.0 ± 2.0 | 42.0 ± 2.0 |"
    )
    assert lines[3].startswith(
        "|  | attentive2x | 0, 1, 2 | 25.0, 26.0, 27.0 | 50.0, 52.0, 54.0 | 52.0 ± 1.2 | +9.0 ± 1.0 | 53.0 ± 1.2"
        " | 26.0 ± 0.6 | 200 | 0.0100 | 0.90 | 0.40 |"
    )
    assert len(lines) == 6 and lines[5].startswith("5 of 180 runs. Not run: keep0.5-large-grey clip 0, ")
    csv = study.runs_csv(tmp_path, 900).splitlines()
    assert csv[0].startswith("cell,row,seed,acc1 at 90,acc1 at 180,") and len(csv) == 6
    assert csv[1] == (
        "keep0.5-large-grey,random2x,0,4.00,8.00,12.00,16.00,20.00,24.00,28.00,32.00,36.00,40.00,41.00,0.01000,0.900,0.400,"
    )
