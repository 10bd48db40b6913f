"""amclip data check and index: the account, the JSON that scripts read, the exit code, sampling, processes."""

import json
from pathlib import Path

import pytest

from amclip_ds import cli
from amclip_ds.data.check import CheckConfig, check
from amclip_ds.shards import index
from tests.unit.data.damaged import header_at, json_fields, picture, sample, samples, tar_of, with_flipped_headers


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four shards: whole, one bad sample of thirty, a flipped header, whole with one image of the first again."""
    folder = tmp_path / "shards"
    folder.mkdir()
    files = {
        "0": tar_of(samples(range(30))),
        "1": tar_of(samples(range(30, 59)) + sample(59, txt=b"caf\xe9")),
        "2": with_flipped_headers(tar_of(samples(range(60, 90))), "000070.jpg"),
        "3": tar_of(samples(range(90, 119)) + sample(119, jpg=picture(3))),
    }
    for name, content in files.items():
        (folder / f"{name}.tar").write_bytes(content)
    return folder


def amclip_check(*words: object, json_file: Path) -> tuple[int, dict]:
    code = cli.main(["data", "check", *map(str, words), "--json", str(json_file)])
    return code, json.loads(json_file.read_text())


def test_the_json_contract(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = amclip_check(shards, "--workers", 1, json_file=tmp_path / "check.json")
    assert code == 2 and not found["ok"]
    assert (found["expected"], found["read"], found["skipped"], found["lost"]) == (120, 118, 1, 1)
    assert [shard["ok"] for shard in found["shards"]] == [True, False, False, False]
    assert [shard["path"] for shard in found["shards"]] == [str(shards / f"{n}.tar") for n in range(4)]
    assert [shard["samples"] for shard in found["shards"]] == [30] * 4
    assert all({"path", "ok", "samples", "problems"} <= set(shard) for shard in found["shards"])
    assert found["shards"][1]["problems"] == [{"kind": "not utf-8", "key": "000059", "count": 1}]
    assert {p["kind"] for p in found["shards"][2]["problems"]} == {"header", "swallowed"}
    assert found["shards"][3]["problems"] == [{"kind": "duplicate", "key": "000119", "count": 1}]
    printed = capsys.readouterr().out
    assert "expected 120, read 118, skipped 1, lost 1: do not submit" in printed
    assert (
        "one epoch: 119 samples" in printed
        and "less than one batch of" in printed
        and "half have at most 6 tokens" in printed
    )
    assert found["epoch"]["steps"] == 0 and found["epoch"]["reading_hours"] > 0 and found["tokens"]["trimmed"] == 0


def test_the_exit_code_says_whether_to_submit(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    assert amclip_check(shards / "0.tar", json_file=out)[0] == 0
    assert amclip_check(shards / "{0,1}.tar", "--workers", 1, json_file=out)[0] == 0  # 1 of 60 is within 2%
    assert amclip_check(shards / "{0,1}.tar", "--workers", 1, "--max-skip-rate", 0.01, json_file=out)[0] == 2
    assert amclip_check(shards / "2.tar", "--max-skip-rate", 1, json_file=out)[0] == 2  # something is lost


def test_sources_as_a_person_writes_them(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards)
    for spec, count in (("0.tar::1.tar", 60), ("[01].tar", 60), ("{0..1}.tar", 60), (".", 120)):
        assert amclip_check(spec, "--workers", 1, json_file=tmp_path / "c.json")[1]["samples"] == count


@pytest.mark.parametrize(
    "words, said",
    [
        (["missing.tar"], "SHARDS: no such shard: missing.tar"),
        (["{0..9}.tar"], "no such shard: 4.tar"),
        (["{0..1.tar"], "SHARDS"),
        (["0.tar", "--captions", "text"], "captions: 'text' is neither"),
        (["0.tar", "--captions", ""], "captions: '' is neither"),
        (["0.tar", "--captions", "[3]"], "--captions: '[3]' is no list of texts"),
        (["0.tar", "--sample", "0"], "--sample: 0.0 is outside"),
        (["0.tar", "--json", "no/folder/c.json"], "--json no/folder/c.json: cannot be written"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], said: str, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(shards)
    assert cli.main(["data", "check", *words]) == 2
    errors = capsys.readouterr().err
    assert said in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    "word, sources",
    [
        ("txt,json:alt", ["txt", "json:alt"]),
        ("[txt, json:alt]", ["txt", "json:alt"]),
        ("{title}, {alt}.", ["{title}, {alt}."]),
        ("['{title},{alt}', txt]", ["{title},{alt}", "txt"]),
    ],
)
def test_sources_of_captions_as_training_takes_them(
    word: str, sources: list[str], shards: Path, tmp_path: Path
) -> None:
    """A template with a comma in it was checked as two sources, of which either would do."""
    words = [shards / "0.tar", "--captions", word, "--workers", 1]
    assert amclip_check(*words, json_file=tmp_path / "c.json")[1]["config"]["captions"] == sources


def test_processes_find_the_same(shards: Path) -> None:
    paths = sorted(map(str, shards.glob("*.tar")))
    one, two = (check(paths, CheckConfig(), processes).as_json() for processes in (1, 2))
    for found in (one, two):
        found.pop("samples_per_core_second")
    assert one == two


def test_a_sampled_check_reads_a_part_and_still_sees_damaged_tars(shards: Path) -> None:
    paths = sorted(map(str, shards.glob("*.tar")))
    report = check(paths, CheckConfig(sample=0.25), 1)
    looked_at = report.total("read") + report.total("skipped")
    assert 15 < looked_at < 50 and report.total("lost") == 1 and not report.ok
    assert report.total("expected") == looked_at + 1 and report.total("samples") == 120
    assert 100 < report.samples_in_an_epoch() <= 120
    again = check(paths, CheckConfig(sample=0.25), 1)
    assert [shard.read for shard in again.shards] == [shard.read for shard in report.shards]


def test_nothing_is_cut_in_a_narrow_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names longer than the terminal, many problems: every name is whole; equal problems are summed up."""
    monkeypatch.setenv("COLUMNS", "40")
    folder = tmp_path / ("a folder with a name of more than eighty characters " * 2)
    folder.mkdir()
    for name in ("the first shard of many", "the second shard of many"):
        (folder / f"{name}.tar").write_bytes(
            tar_of([("k" * 90 + f".{suffix}", b"x") for suffix in ("jpg", "txt")] + sample(1, txt=b" "))
        )
    assert cli.main(["data", "check", str(folder), "--workers", "1"]) == 2
    printed = capsys.readouterr().out
    for name in ("the first shard of many", "the second shard of many"):
        assert f"{folder / name}.tar: NOT ok, read 0, skipped 2, lost 0\n" in printed
    assert f"  broken image: 1, {'k' * 90}\n" in printed
    assert f"empty caption: 2 in all, the first 000001 in {folder / 'the first shard of many'}.tar\n" in printed


def test_a_shard_that_is_gone_is_lost(tmp_path: Path) -> None:
    """As a copy that was broken off leaves a folder: what sizes.json or img2dataset's statistics name counts."""
    for number in range(3):
        (tmp_path / f"{number:05d}.tar").write_bytes(tar_of(samples(range(4 * number, 4 * number + 4))))
    (tmp_path / "sizes.json").write_text(json.dumps({f"{number:05d}.tar": 4 for number in range(3)}))
    code, found = amclip_check(tmp_path, json_file=tmp_path / "whole.json")
    assert code == 0 and found["lost"] == 0
    (tmp_path / "00001.tar").unlink()
    code, found = amclip_check(tmp_path, json_file=tmp_path / "found.json")
    assert code == 2 and [found[key] for key in ("expected", "read", "lost")] == [12, 8, 4]
    [gone] = [shard for shard in found["shards"] if shard["lost"]]
    assert gone["path"] == str(tmp_path / "00001.tar") and gone["problems"][0]["kind"] == "fewer than promised"
    code, found = amclip_check(tmp_path / "00000.tar", json_file=tmp_path / "part.json")
    assert code == 0 and found["expected"] == 4, "of a part that was asked for, the others are nobody's loss"
    (tmp_path / "sizes.json").unlink()
    (tmp_path / "00001_stats.json").write_text(json.dumps({"successes": 3}))
    assert amclip_check(tmp_path, json_file=tmp_path / "stats.json")[1]["lost"] == 3


def test_duplicates_across_shards_and_within(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar_of(samples(range(4)) + sample(8, jpg=picture(1)) + sample(9, jpg=picture(1))))
    (tmp_path / "1.tar").write_bytes(tar_of(sample(10) + sample(11, jpg=picture(2)) + sample(12, jpg=picture(10))))
    report = check([str(tmp_path / "0.tar"), str(tmp_path / "1.tar")], CheckConfig(), 1)
    assert [shard.problems["duplicate"] for shard in report.shards] == [("000008", 2), ("000011", 2)]
    assert report.total("read") == 9  # they are trained on all the same


def test_caption_sources(tmp_path: Path) -> None:
    files = [sample(n, txt=None, json=json_fields(title="a", alt=f"b {n}" if n % 2 else None)) for n in range(6)]
    (tmp_path / "0.tar").write_bytes(tar_of([file for files_of_one in files for file in files_of_one]))
    shard = [str(tmp_path / "0.tar")]
    assert check(shard, CheckConfig(), 1).problems()["no caption"] == 6
    assert check(shard, CheckConfig(captions=("json:alt",)), 1).problems()["no caption"] == 3
    assert check(shard, CheckConfig(captions=("json:alt|{title}.",)), 1).total("read") == 6


def test_index_agrees_with_the_check(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "index", str(shards), "--out", str(tmp_path / "index"), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    made = index.Index(tmp_path / "index")
    assert len(made) == 119 and f"119 samples in 4 shards, fingerprint {made.fingerprint()}" in printed
    assert "2.tar: header (1)" in printed and printed.splitlines()[-1] == str(tmp_path / "index")


def test_index_is_beside_the_shards_unless_out_is_given(shards: Path) -> None:
    assert cli.main(["data", "index", str(shards / "0.tar"), "--workers", "1"]) == 0
    assert index.default_folder((str(shards / "0.tar"),)).is_dir()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["data", "--help"], *(["data", action, "--help"] for action in ("synth", "check"))):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "expected = read + skipped + lost" in printed and "amclip data synth --out scenes" in printed


def test_header_at_finds_the_header(shards: Path) -> None:
    content = (shards / "0.tar").read_bytes()
    assert content[header_at(content, "000004.txt") :].startswith(b"000004.txt\0")
