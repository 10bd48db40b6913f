"""The study's grid (benchmarks/study.py): every run of it can be set up, and the table says what is missing."""

from pathlib import Path

import pytest

from amclip_ds import config
from benchmarks import study


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
