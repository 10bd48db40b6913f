"""Pictures of the masks: what is stored reads back as the same patches, in Python and in the page's script."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amclip_ds import config as settings
from amclip_ds import pictures
from amclip_ds.data.captions import build_tokenizer
from amclip_ds.data.photometric import Photometric
from amclip_ds.jsonl import append_line
from amclip_ds.method import method_of
from amclip_ds.report.page import write_report
from amclip_ds.report.pictures import gone, read_pictures
from tests.distributed.batches import Batch
from tests.unit.report.browser import Browser, needs_chromium
from tests.unit.report.runs import eventful

GRID, KEPT = 8, 32


def made_batch(count: int = 3) -> Batch:
    random = torch.Generator().manual_seed(0)
    ids = build_tokenizer()(["a red star", "naïve 東京 <b>", ""], 77)
    return Batch(
        torch.randint(256, (2, count, 3, 64, 64), dtype=torch.uint8, generator=random),
        torch.randint(256, (count, 3, 64, 64), dtype=torch.uint8, generator=random),
        torch.zeros(3, count, 4),
        Photometric(np.zeros((2, count, 1), np.float32)),
        torch.zeros(2, count, 16),
        ids,
        torch.arange(count),
        0,
        {},
    )


@pytest.fixture()
def stored(tmp_path: Path) -> tuple[Path, list[pictures.Shot]]:
    run = eventful(tmp_path / "run")
    return run, store(run)


def store(run: Path) -> list[pictures.Shot]:
    """Pictures of the masks at two steps, as a trainer leaves them in RUN/pictures."""
    method = method_of(settings.load("aclip-tiny", ["data.train=x"]))
    pictures.store_samples(run / "pictures", made_batch(), method)
    shots = []
    for step in (10, 100):
        random = torch.Generator().manual_seed(step)
        kept = [torch.rand(3, GRID**2, generator=random).topk(KEPT).indices.sort().values for _ in range(2)]
        shots.append(
            pictures.Shot([kept[0], None if step == 10 else kept[1]], torch.rand(3, GRID**2, generator=random))
        )
        append_line(run / "pictures" / "masks.jsonl", pictures.row_of(step, shots[-1], GRID))
    return shots


def patches_of(path: str) -> set[int]:
    """The patches that an SVG path of runs covers."""
    found = set()
    for part in path.split("M")[1:]:
        corner, rest = part.split("h", 1)
        column, row = map(int, corner.split())
        found |= {row * GRID + column + i for i in range(int(rest.split("v")[0]))}
    return found


def test_what_is_stored_reads_back(stored: tuple[Path, list[pictures.Shot]]) -> None:
    run, shots = stored
    found = read_pictures(run)
    assert found is not None and found.steps == [10, 100]
    assert [sample.caption for sample in found.samples] == ["a red star", "naïve 東京 < b >", ""]
    for place, sample in enumerate(found.samples):
        teacher, *views = sample.images
        assert teacher.kind == "scores" and len(teacher.frames[0]) == 2 * GRID**2
        for view, image in enumerate(views):
            kept = shots[1].kept[view]
            assert kept is not None
            assert patches_of(image.shown) == set(range(GRID**2)) - set(kept[place].tolist())
        assert gone(views[1].frames[0], GRID) == "", "null: every token stays"
        assert views[0].uri.startswith("data:image/webp;base64,")


@needs_chromium
def test_the_page_shows_the_masks_of_any_step(stored: tuple[Path, list[pictures.Shot]], tmp_path: Path) -> None:
    run, shots = stored
    write_report([run], tmp_path / "report.html")
    with Browser(tmp_path / "report.html") as page:
        page.value("document.querySelector('#run0-tab5').click()")
        assert page.value("document.querySelectorAll('.picture').length") == 9
        page.value("(s => { s.value = 0; s.dispatchEvent(new Event('input')) })(document.querySelector('input.at'))")
        assert page.value("document.querySelector('.at-step').textContent") == "10"
        kept = shots[0].kept[0]
        assert kept is not None
        for place in range(3):
            path = page.value(
                f"document.querySelectorAll('svg.kept')[{2 * place}].querySelector('path').getAttribute('d')"
            )
            assert patches_of(path) == set(range(GRID**2)) - set(kept[place].tolist())
        assert page.errors == []


def test_the_masks_in_numbers(stored: tuple[Path, list[pictures.Shot]]) -> None:
    """Agreement with the last step's choice, of what it keeps; the objects' share where a row has it."""
    run, shots = stored
    first, last = (shot.kept[0] for shot in shots)
    assert first is not None and last is not None
    shared = [len(set(one.tolist()) & set(other.tolist())) / KEPT for one, other in zip(first, last)]
    found = read_pictures(run)  # of the second view's first row everything stays: there is nothing to compare
    assert (
        found is not None
        and found.numbers[0][1] == pytest.approx(sum(shared) / 3)
        and found.numbers[-1] == (100, 1.0, None)
    )
    row = pictures.row_of(200, shots[1], GRID) | {"object_share": 0.75}
    append_line(run / "pictures" / "masks.jsonl", row)
    append_line(run / "pictures" / "masks.jsonl", row | {"step": 300, "object_share": "x", "scores": None})
    found = read_pictures(run)
    assert found is not None and found.numbers[2] == (200, 1.0, 0.75) and found.numbers[3] == (300, None, None)
    write_report([run], run / "report.html")
    assert "75%" in (run / "report.html").read_text()


def test_what_no_run_stores_is_left_out(stored: tuple[Path, list[pictures.Shot]]) -> None:
    """Names that lead elsewhere, files that are no image, rows of another shape."""
    folder = stored[0] / "pictures"
    facts = json.loads((folder / "samples.json").read_text())
    facts["samples"][0]["views"] = ["../../secret.webp", 7]
    (folder / "sample1_view0.webp").write_text("no image")
    (folder / "samples.json").write_text(json.dumps(facts))
    found = read_pictures(stored[0])
    assert found is not None and [len(sample.images) for sample in found.samples] == [1, 2, 3]
    append_line(folder / "masks.jsonl", {"step": 101, "kept": [["zz"], "x"], "scores": 5})
    found = read_pictures(stored[0])
    assert found is not None and sum(len(sample.images) for sample in found.samples) < 6
    (folder / "samples.json").write_text('{"grid": 1e9}')
    assert read_pictures(stored[0]) is None


def test_the_picture_darkens_what_goes_and_nothing_else() -> None:
    image = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    kept = torch.tensor([0, 1, 8, 9])
    shown = np.asarray(pictures.thumbnail(pictures.darkened(image, kept, GRID)))
    cell = pictures.SIDE // GRID
    assert (shown[: 2 * cell - 1, : 2 * cell - 1] == 200).all() and (shown[2 * cell + 1 :] == 36).all()


def test_a_long_caption_and_strange_letters_fit_the_sheet() -> None:
    sheet = pictures.sheet([("x" * 90, [Image.new("RGB", (112, 112))])], ["東京 " + "long " * 200], has_scores=True)
    assert sheet.width < 500


@pytest.mark.parametrize(
    "asked, of_saves, total, between",
    [
        (1000, 0, 9, [1000]),
        (1000, 10, 2000, [1000, 10]),
        (0, 10, 2001, [20]),
        (0, 7, 20_000, [105]),
        (3, 500, 100, [3, 500]),
    ],
)
def test_the_saves_of_a_run_bring_at_most_200_pictures(
    asked: int, of_saves: int, total: int, between: list[int]
) -> None:
    assert pictures.steps_between(asked, of_saves, total) == between
    assert not of_saves or total // between[-1] <= 200


@pytest.mark.parametrize("every, due", [(4, [1, 4, 6, 8, 12]), (100, [1, 6, 12])])
def test_pictures_are_due_with_each_checkpoint(every: int, due: list[int]) -> None:
    looks = object.__new__(pictures.Pictures)
    looks._total, looks._steps = 12, [every, 6]
    assert [step for step in range(1, 13) if looks.is_due(step)] == due
