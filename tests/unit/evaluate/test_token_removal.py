"""`amclip eval --keep-ratio`: the right number of patches, the same ones however they are encoded, and rows that nobody
takes for whole images'."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from amclip_ds import cli
from amclip_ds.comm import SingleProcess
from amclip_ds.data.photometric import normalise
from amclip_ds.evaluate import rows, token_removal
from amclip_ds.evaluate.datasets import open_set
from amclip_ds.evaluate.encoder import TowerEncoder, encode_images
from amclip_ds.evaluate.probe import features_of
from amclip_ds.masks.selection import select
from tests.unit.evaluate.exports import write_run
from tests.unit.evaluate.test_encoder import tiny_encoder, write_set
from tests.unit.thread_ranks import run_threads

CPU = torch.device("cpu")
GRID = 4  # of the tiny encoder's images


def removing(encoder: TowerEncoder, keep_ratio: float) -> TowerEncoder:
    return TowerEncoder(encoder.towers, "student", 32, 77, CPU, keep_ratio)


def kept(keep_ratio: float, numbers: range) -> torch.Tensor:
    chosen = token_removal.selection(keep_ratio, GRID, numbers, len(numbers), CPU)
    found = select(chosen.config, chosen.inputs)
    assert found is not None
    return found


@pytest.mark.parametrize("keep_ratio, count", [(0.5, 8), (0.3, 5), (1 / 16, 1), (0.99, 16)])
def test_the_tower_encodes_as_many_patches_as_asked(
    keep_ratio: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, seen = tiny_encoder(), []
    towers: Any = encoder.towers
    through = towers.vision.through_blocks
    monkeypatch.setattr(
        towers.vision, "through_blocks", lambda x, *more: (seen.append(x.shape[1]), through(x, *more))[1]
    )
    images = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8)
    removing(encoder, keep_ratio).image(images, range(3))
    removing(encoder, keep_ratio).features(images, range(3))
    assert seen == [1 + count] * 2, "the class token and those"
    encoder.image(images)
    assert seen[-1] == 1 + GRID**2


def test_one_is_no_option_bit_for_bit(tmp_path: Path) -> None:
    """Twin: less gives other embeddings, of which each is what the tower makes of the patches that the mask keeps."""
    samples, encoder = open_set(str(write_set(tmp_path / "set"))).samples, tiny_encoder()
    whole = encode_images(encoder, samples, 4, SingleProcess())
    assert torch.equal(encode_images(removing(encoder, 1.0), samples, 4, SingleProcess()), whole)
    half = encode_images(removing(encoder, 0.5), samples, 4, SingleProcess())
    assert not torch.equal(half, whole)

    towers: Any = encoder.towers
    images = torch.stack([encoder.preprocess(sample.read()) for sample in samples])
    output = towers.vision(normalise(images), keep_indices=kept(0.5, range(len(samples))))
    expected = torch.nn.functional.normalize(towers.image_projection(towers.vision.feature(output.tokens)), dim=-1)
    torch.testing.assert_close(half, expected)


def test_the_draw_is_the_images_own() -> None:
    """Whatever batch it is in; twin: another image of the set keeps others."""
    together, alone = kept(0.5, range(5)), kept(0.5, range(3, 4))
    assert torch.equal(together[3:4], alone)
    assert len({tuple(row) for row in together.tolist()}) == 5


@pytest.mark.parametrize("batch_size", [4, 8])
def test_ranks_and_batches_change_nothing(batch_size: int, tmp_path: Path) -> None:
    data, encoder = open_set(str(write_set(tmp_path / "set"))), tiny_encoder()
    reference = encode_images(removing(encoder, 0.5), data.samples, 3, SingleProcess())
    alone = encode_images(removing(encoder, 0.5), data.samples, batch_size, SingleProcess())
    torch.testing.assert_close(alone, reference)
    features, _ = features_of(removing(encoder, 0.5), data, batch_size, SingleProcess())

    def work(comm: Any) -> tuple[torch.Tensor, Any]:
        mine = removing(encoder, 0.5)
        return encode_images(mine, data.samples, batch_size, comm), features_of(mine, data, batch_size, comm)[0]

    for images, of_probes in run_threads(3, work):
        assert torch.equal(images, alone) and (of_probes == features).all()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/, and set/ with 21 images."""
    folder = tmp_path_factory.mktemp("removal")
    write_set(folder / "set")
    write_run(folder / "run")
    return folder


def test_its_rows_are_their_own(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twin: a row of whole images is no substitute for it, nor it for one."""
    run, out = place / "run", tmp_path / "n.json"
    words = ["eval", str(run), "--data", str(place / "set"), "--weights", "student", "--json", str(out)]
    data = open_set(str(place / "set"))

    def evaluated(*more: str) -> tuple[dict[str, Any], str]:
        assert cli.main([*words, *more]) == 0
        (row,) = json.loads(out.read_text())
        return row, capsys.readouterr().out

    half, printed = evaluated("--keep-ratio", "0.5")
    assert (half["keep_ratio"], half["dataset"]) == (0.5, f"{data.name} keep=0.5")
    assert half["dataset"] in printed and "patches of each image, drawn" in printed and "1 of 1 rows app" in printed
    assert rows.missing(run, half["step"], [data], ["student"]) == {"student": [data]}, "amclip watch makes it still"

    whole, printed = evaluated()
    assert whole["dataset"] == data.name and "keep_ratio" not in whole and "1 of 1 rows appended" in printed
    assert "patches of each image" not in printed
    assert rows.missing(run, whole["step"], [data], ["student"]) == {}
    again, printed = evaluated("--keep-ratio", "1")
    assert again == whole and "0 of 1 rows appended" in printed
    again, printed = evaluated("--keep-ratio", "0.5", "--batch-size", "5")
    assert again["metrics"] == half["metrics"] and "0 of 1 rows appended" in printed
    assert "1 of 1 rows appended" in evaluated("--keep-ratio", "0.25")[1]
    written = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [row.get("keep_ratio") for row in written] == [0.5, None, 0.25]


@pytest.mark.parametrize(
    "ratio, said",
    [
        ("0", "--keep-ratio: 0 is outside (0, 1]"),
        ("1.5", "--keep-ratio: 1.5 is outside (0, 1]"),
        ("nan", "--keep-ratio: nan is outside (0, 1]"),
        ("half", "--keep-ratio: 'half' is not a number"),
        ("0.001", "patches not one stays; at least"),
    ],
)
def test_a_mistake_is_one_line(ratio: str, said: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(place / "run"), "--data", str(place / "set"), "--keep-ratio", ratio, "--procs", "2"]
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0] and not captured.out


def test_an_export_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "open_clip_config.json").write_text("{}")
    words = ["eval", str(tmp_path), "--data", str(place / "set"), "--keep-ratio", "0.5"]
    assert cli.main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "is an export (open_clip); name the run or the checkpoint" in lines[0]
