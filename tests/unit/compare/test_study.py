"""The study's grid (benchmarks/study.py): every run of it can be set up, and the table says what is missing."""

from pathlib import Path

import pytest

from amclip_ds import config
from amclip_ds.compare.runs import Run, make_runs, read_rows
from benchmarks import study
from tests.unit.compare.test_compare import write_run


@pytest.mark.slow
def test_the_grid_is_whole_and_every_row_can_run(tmp_path: Path) -> None:
    runs = list(study.grid([], []))
    assert len(runs) == 8 * 6 + 9 and len({(cell.name, name) for cell, name, _ in runs}) == len(runs)
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
    text = study.table(tmp_path)
    assert "Not run (57): keep0.5-large-grey clip, " in text and len(text.splitlines()) == 4
    assert study.spread({"mean": 0.123, "std_error": 0.004}) == "12.3 ± 0.4" and study.spread(None) == ""


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
