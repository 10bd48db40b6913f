"""amclip data stats: the numbers of a set whose sizes are known, as JSON and as a picture."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amclip_ds import cli
from amclip_ds.data import stats
from amclip_ds.data.check import CheckConfig, check
from tests.unit.data.damaged import picture, sample, tar_of


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Ten JPEGs of 40, 50, ... 130 x 80 pixels and a PNG without caption; caption n has n + 1 words, the last 100."""
    files = [sample(n, jpg=picture(n, (40 + 10 * n, 80)), txt=b"cat " * (n + 1 if n < 9 else 100)) for n in range(10)]
    files.append(sample(10, jpg=None, png=picture(10, kind="PNG"), txt=None))
    (tmp_path / "0.tar").write_bytes(tar_of([file for one in files for file in one]))
    return tmp_path / "0.tar"


def test_numbers(shard: Path) -> None:
    numbers = stats.summarise(check([str(shard)], CheckConfig(decode=False), 1))
    assert numbers["samples"] == 10 and numbers["formats"] == {"jpg": 10} and numbers["problems"] == {"no caption": 1}
    found = {name: dict(zip(stats.PERCENTILES, row["percentiles"])) for name, row in numbers["distributions"].items()}
    assert (found["width"][0], found["width"][100], found["height"][50]) == (40, 130, 80)
    assert found["width"][50] == np.percentile(np.arange(40, 140, 10), 50)
    assert found["width / height"][100] == 130 / 80
    assert (found["tokens"][0], found["tokens"][100]) == (3, 102)
    assert numbers["distributions"]["characters"]["mean"] == pytest.approx(
        np.mean([4 * n - 1 for n in [*range(1, 10), 100]])
    )
    assert numbers["trimmed_captions"] == 0.1


def test_command(shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "stats", str(shard), "--json", str(tmp_path / "stats.json"), "--out", str(tmp_path / "pictures")]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "10 samples" in printed and "captions over 77 tokens, trimmed in training: 10.0%" in printed
    assert json.loads((tmp_path / "stats.json").read_text())["samples"] == 10
    drawn = np.asarray(Image.open(tmp_path / "pictures" / "stats.png").convert("L"))
    assert drawn.shape[1] > 1000 and (drawn < 200).mean() > 0.02


def test_a_set_without_a_usable_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.tar").write_bytes(tar_of([]))
    assert cli.main(["data", "stats", str(tmp_path / "0.tar"), "--out", str(tmp_path)]) == 0
    assert "0 samples" in capsys.readouterr().out


def test_what_is_not_in_the_numbers_is_said(shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "stats", str(shard), "--workers", "1"]) == 0
    assert "not in these numbers: 1 shards, expected 11, read 10, skipped 1, lost 0 (no caption 1)" in (
        capsys.readouterr().out
    )
    words = ["data", "stats", str(shard), "--captions", "json:alt", "--words", str(tmp_path / "words.json")]
    assert cli.main(words) == 2 and not (tmp_path / "words.json").exists()
    assert "no caption was read, so there is no word to count" in capsys.readouterr().err
