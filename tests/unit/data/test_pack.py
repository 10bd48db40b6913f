"""`amclip data pack`: of each kind of source the same samples; broken rows are named; killed, it continues."""

import csv
import errno
import json
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from amclip_ds import files
from amclip_ds.cli import main
from tests.unit.data.damaged import picture

COUNT = 12
BROKEN = {3: "missing file", 5: "unreadable image", 7: "empty caption"}
"""rows of a table that are broken, and why"""


def write_images(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number in range(COUNT):
        if BROKEN.get(number) != "missing file":
            content = picture(number, kind=("JPEG", "PNG", "WEBP")[number % 3])
            content = content[: len(content) // 2] if BROKEN.get(number) == "unreadable image" else content
            (folder / f"{number}.img").write_bytes(content)
    return folder


def caption(number: int) -> str:
    return " \u200b" if BROKEN.get(number) == "empty caption" else f"picture, number {number}"


def write_table(path: Path, separator: str = ",") -> Path:
    write_images(path.parent / "images")
    with path.open("w", newline="") as file:
        rows = csv.writer(file, delimiter=separator)
        rows.writerow(["filepath", "title"])
        rows.writerows([f"images/{number}.img", caption(number)] for number in range(COUNT))
    return path


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """key -> {suffix: content} of all tars, in order."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                found.setdefault(key, {})[suffix] = content.read()
    return found


def pack(source: Path, out: Path, *words: str) -> int:
    return main(["data", "pack", str(source), "--out", str(out), "--workers", "2", *words])


def kept(broken: dict[int, str] = BROKEN) -> list[str]:
    return [f"{number:09d}" for number in range(COUNT) if number not in broken]


@pytest.mark.parametrize("name, separator", [("pairs.csv", ","), ("pairs.tsv", "\t"), ("tabs.csv", "\t")])
def test_a_table_is_packed_and_its_broken_rows_are_named(
    tmp_path: Path, name: str, separator: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path / name, separator)
    assert pack(table, tmp_path / "out", "--shard-size", "4", "--json", str(tmp_path / "facts.json")) == 0
    printed = capsys.readouterr().out
    found = samples(tmp_path / "out")
    assert list(found) == kept()
    for key, members in found.items():
        number = int(key)
        assert members.pop("txt").decode() == caption(number)
        assert members == {("jpg", "png", "webp")[number % 3]: (tmp_path / f"images/{number}.img").read_bytes()}
    assert "12 rows = 9 samples in 3 tar(s) + 3 left out" in printed
    assert "left out: 1 rows: missing file; the first is row 4, images/3.img" in printed
    assert "unreadable image: " in printed and "empty caption; the first is row 8" in printed
    assert json.loads((tmp_path / "facts.json").read_text())["left_out"] == 3
    sizes = json.loads((tmp_path / "out" / "sizes.json").read_text())
    assert sizes == {"00000.tar": 4, "00001.tar": 4, "00002.tar": 1}
    assert main(["data", "check", str(tmp_path / "out"), "--workers", "1"]) == 0


def test_a_folder_of_images_beside_captions(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for number, name in enumerate(("a", "b", "below/c", "d", "e")):
        (folder / f"{name}.jpg").write_bytes(picture(number))
    (folder / "a.txt").write_text("first\nsecond\n")
    (folder / "b.json").write_text(json.dumps({"caption": "of json"}))
    (folder / "below/c.txt").write_text("deep")
    (folder / "e.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "lonely.txt").write_text("no image")
    assert pack(folder, tmp_path / "out", "--json", str(tmp_path / "facts.json")) == 0
    assert [members["txt"].decode() for members in samples(tmp_path / "out").values()] == [
        "first\nsecond",
        "of json",
        "deep",
    ]
    causes = json.loads((tmp_path / "facts.json").read_text())["causes"]
    assert causes == {"no caption": 1, "not utf-8": 1, "no image beside the caption": 1}


def test_an_image_folder_with_metadata(tmp_path: Path) -> None:
    """As Hugging Face's `imagefolder` has it."""
    write_images(tmp_path / "photos")
    lines = [json.dumps({"file_name": f"{number}.img", "text": caption(number)}) for number in range(COUNT)]
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join([*lines[:2], "{torn", *lines[3:]]) + "\n")
    assert pack(tmp_path / "photos", tmp_path / "out") == 0
    assert list(samples(tmp_path / "out")) == kept(BROKEN | {2: "not json"})


def rows_of_images(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for number in range(COUNT):
        file = folder / f"{number}.img"
        image = {"bytes": file.read_bytes() if file.exists() else None, "path": file.name}
        rows.append({"image": image, "text": caption(number) if number != 9 else None, "label": number})
    return rows


def test_parquet_of_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Splits by the files' names; the image's bytes inside, in a struct."""
    rows = rows_of_images(write_images(tmp_path / "images"))
    data = tmp_path / "set" / "data"
    data.mkdir(parents=True)
    for part in range(2):
        pq.write_table(pa.Table.from_pylist(rows[part * 6 : part * 6 + 6]), data / f"train-0000{part}-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:2]), data / "test-00000-of-00001.parquet")
    assert pack(tmp_path / "set", tmp_path / "out") == 2
    assert "has the splits test, train: choose with --split" in capsys.readouterr().err
    assert pack(tmp_path / "set", tmp_path / "out", "--split", "train") == 0
    assert list(samples(tmp_path / "out")) == kept(BROKEN | {9: "no caption"})
    assert (
        "its image is a path, not bytes; the first is row 4, train-00000-of-00002.parquet, row 4"
        in capsys.readouterr().out
    )


def test_a_data_set_saved_to_disk(tmp_path: Path) -> None:
    """Arrow streams, in the order of state.json; several captions a row; another column by name."""
    rows = [
        {"picture": row["image"]["bytes"], "text": [str(row["text"]), "again"]}
        for row in rows_of_images(write_images(tmp_path / "images"))
    ]
    folder = tmp_path / "set"
    folder.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (rows[:5], rows[5:])):
        table = pa.Table.from_pylist(
            part, schema=pa.schema([("picture", pa.binary()), ("text", pa.list_(pa.string()))])
        )
        with pa.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    assert pack(folder, tmp_path / "out", "--image-key", "picture") == 0
    found = samples(tmp_path / "out")
    assert list(found) == kept({3: "", 5: ""}) and found["000000000"]["txt"] == b"picture, number 0\nagain"


@pytest.mark.parametrize(
    "names",
    [("train/0000.parquet", "test/0000.parquet"), ("my_train.parquet", "test.parquet"), ("train/a-Val/x.arrow",)],
)
def test_splits_by_folders_and_by_names(
    tmp_path: Path, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """As the hub converts data sets, and as people write them: a training set is never packed with its test set."""
    rows = rows_of_images(write_images(tmp_path / "images"))[:3]
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(rows)
        if name.endswith(".parquet"):
            pq.write_table(table, tmp_path / "set" / name)
        else:
            with pa.ipc.new_stream(str(tmp_path / "set" / name), table.schema) as stream:
                stream.write_table(table)
    if len(names) > 1:
        assert pack(tmp_path / "set", tmp_path / "out") == 2
        assert "has the splits test, train: choose with --split" in capsys.readouterr().err
    assert pack(tmp_path / "set", tmp_path / "out", "--split", "train") == 0
    assert "3 rows in 1 files" in capsys.readouterr().out
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / "more.parquet")
    assert pack(tmp_path / "set", tmp_path / "more", "--split", "train") == 2
    assert "more.parquet is of no split, beside" in capsys.readouterr().err


def test_several_data_sets_below_one_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of_images(write_images(tmp_path / "images"))[:3]
    for name in ("en", "de"):
        (tmp_path / "set" / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / name / "train-00000-of-00001.parquet")
    assert pack(tmp_path / "set", tmp_path / "out") == 2
    assert "are of two data sets: name the folder of one" in capsys.readouterr().err
    assert pack(tmp_path / "set" / "en", tmp_path / "out") == 0
    pq.write_table(pa.table({"image": [b"x"], "sentences": ["a"]}), tmp_path / "set" / "en" / "train-1-of-2.parquet")
    assert pack(tmp_path / "set" / "en", tmp_path / "two") == 2
    assert "no column 'text', as train-00000-of-00001.parquet has" in capsys.readouterr().err


def test_an_option_that_the_source_does_not_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "pairs.csv")
    for split in ("train", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        (tmp_path / "photos" / split / "a.jpg").write_bytes(picture(0))
        (tmp_path / "photos" / split / "a.txt").write_text("a")
    pq.write_table(pa.table({"image": [picture(0)], "text": ["a"]}), tmp_path / "one.parquet")
    for source, option, value in (
        (table, "--split", "train"),
        (tmp_path / "photos", "--split", "train"),
        (tmp_path / "photos", "--root", str(tmp_path)),
        (tmp_path / "photos", "--caption-key", "text"),
        (tmp_path / "one.parquet", "--split", "train"),
        (tmp_path / "one.parquet", "--root", str(tmp_path)),
    ):
        assert pack(source, tmp_path / "out", option, value) == 2
        assert f"{option} {value}: " in capsys.readouterr().err


@pytest.mark.parametrize("shard_size", [1, 2])
def test_rows_of_one_image_are_one_sample(tmp_path: Path, shard_size: int, capsys: pytest.CaptureFixture[str]) -> None:
    """As Flickr30K's table: five captions an image, a row each. Continued behind any tar it ends the same."""
    write_images(tmp_path / "images")
    rows = [(f"images/{number}.img", f"{caption(number)}, {way}") for number in (0, 1, 3, 2) for way in range(5)]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    words = ["--shard-size", str(shard_size)]
    assert pack(tmp_path / "pairs.csv", tmp_path / "out", *words) == 0
    said = capsys.readouterr().out  # no sample has the further captions of an image that is left out
    assert "20 rows = 3 samples in" in said and "+ 5 left out + 12 further rows" in said
    assert "left out: 5 rows: missing file; the first is row 11, images/3.img" in said
    found = samples(tmp_path / "out")
    assert list(found) == ["000000000", "000000005", "000000015"]
    assert found["000000005"]["txt"].decode().split("\n") == [f"picture, number 1, {way}" for way in range(5)]
    assert main(["data", "check", str(tmp_path / "out"), "--workers", "1"]) == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    record = (tmp_path / "out" / "pack.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "pack.jsonl").write_text("".join(record[:2]))
    assert pack(tmp_path / "pairs.csv", tmp_path / "out", *words) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole


WITH_QUOTES = {
    ".tsv": [  # a line of the table -> the caption
        ("{}\ta dog, sitting", "a dog, sitting"),
        ('{}\t"Hello world, said the dog', '"Hello world, said the dog'),
        ('{}\t"Hello," said the dog', '"Hello," said the dog'),
        ('{}\ta pipe of 5"', 'a pipe of 5"'),
        ('{}\t"a ""quoted"" dog"', 'a "quoted" dog'),
        ('{}\t"a dog\non two lines"', "a dog on two lines"),
        ('{}\tthe last, "unclosed', 'the last, "unclosed'),
        ('{}\t"the end', '"the end'),
    ],
    ".csv": [
        ("{},a dog", "a dog"),
        ('{},"Hello world, said the dog', "Hello world, said the dog"),
        ("{},a plain one", "a plain one"),
        ('{},"well, quoted"', "well, quoted"),
        ('{},"of a, row', "of a, row"),
        ('{},a pipe of 5"', 'a pipe of 5"'),
        ('{},"a dog, ""quoted"",\non two lines"', 'a dog, "quoted", on two lines'),
        ('{},"a "sloppy" dog"', 'a sloppy" dog"'),
        ('{},"the end', "the end"),
    ],
}


@pytest.mark.parametrize("suffix", WITH_QUOTES)
def test_a_quote_that_is_not_closed_takes_no_other_row(suffix: str, tmp_path: Path) -> None:
    """csv alone gave the rows after it to its cell, as the caption of one image, and said nothing."""
    (tmp_path / "i").mkdir()
    lines = []
    for number, (line, _) in enumerate(WITH_QUOTES[suffix]):
        (tmp_path / "i" / f"{number}.jpg").write_bytes(picture(number))
        lines.append(line.format(f"i/{number}.jpg"))
    heading = "image\tcaption" if suffix == ".tsv" else "image,caption"
    (tmp_path / f"pairs{suffix}").write_text("\n".join([heading, *lines]))
    assert pack(tmp_path / f"pairs{suffix}", tmp_path / "out") == 0
    found = [sample["txt"].decode() for sample in samples(tmp_path / "out").values()]
    assert found == [caption for _, caption in WITH_QUOTES[suffix]]


def test_another_source_of_the_same_size_is_another_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table that was sorted, a caption that was corrected: continued, the tars would hold rows of both."""
    write_images(tmp_path / "images")
    rows = [f"images/{number}.img,picture {number}" for number in (0, 1, 2)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *rows]))
    (photos := tmp_path / "photos").mkdir()
    (photos / "a.jpg").write_bytes(picture(0))
    (photos / "a.txt").write_text("a dog")
    for source, change in (
        (tmp_path / "pairs.csv", "\n".join(["image,caption", *reversed(rows)])),
        (photos / "a.txt", "a cat"),
    ):
        packed, out = (photos if source.suffix == ".txt" else source), tmp_path / f"{source.suffix}.out"
        assert pack(packed, out) == 0 and pack(packed, out) == 0
        source.write_text(change)
        capsys.readouterr()
        assert pack(packed, out) == 2
        assert "holds a pack of something else (source differ)" in capsys.readouterr().err


def test_names_that_differ_in_case_hidden_and_linked_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x.jpg", "x.JPG", "y.jpg", "z.jpg", ".snapshot/y.jpg", "elsewhere/v.jpg"):
        (path := tmp_path / ("photos" if "/v" not in name else "") / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(len(name)))
        path.with_suffix(".txt").write_text(name)
    (tmp_path / "photos" / "z.TXT").write_text("another")
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "round").symlink_to(tmp_path)
    assert pack(tmp_path / "photos", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "4 rows = 2 samples in 1 tar(s) + 2 left out" in said
    assert "several images of one name" in said and "several captions of one name" in said
    texts = [sample["txt"].decode() for sample in samples(tmp_path / "out").values()]
    assert texts == ["elsewhere/v.jpg", "y.jpg"]


def test_two_packs_into_one_folder_leave_whole_tars(tmp_path: Path) -> None:
    """Submitted twice: the second is stopped when the first has written a tar, and no tar is ever half of one."""
    table = write_table(tmp_path / "pairs.csv")
    assert pack(table, tmp_path / "whole", "--shard-size", "3") == 0
    script = (
        "import sys, time\n"
        "from amclip_ds.data import pack\n"
        "real = pack._Shards.take\n"
        "def take(shards, row, sample):\n"
        "    real(shards, row, sample)\n"
        "    time.sleep(DELAY)\n"
        "pack._Shards.take = take\n"
        "from amclip_ds.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    argv = ["data", "pack", str(table), "--out", str(tmp_path / "out"), "--shard-size", "3"]
    began = [
        subprocess.Popen([sys.executable, "-c", script.replace("DELAY", delay), *argv], stderr=subprocess.PIPE)
        for delay in ("0.05", "0.3")
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in began]
    codes = sorted(process.returncode for process in began)
    assert codes in ([0, 2], [2, 2], [0, 0]), errors
    stopped = [error for process, error in zip(began, errors) if process.returncode]
    assert all("another `amclip data pack` writes there" in error for error in stopped)
    assert main(argv) == 0
    for path in (tmp_path / "whole").iterdir():
        # A line of the record may be there twice, written by both at one moment, and counts once.
        found, expected = ((folder / path.name).read_bytes().split(b"\n") for folder in (tmp_path / "out", path.parent))
        assert (list(dict.fromkeys(found)) if path.name == "pack.jsonl" else found) == expected, path.name
    assert not list((tmp_path / "out").glob(".*"))


def test_what_is_wrong_with_the_source_is_not_said_of_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": picture(number % COUNT), "text": caption(0)} for number in range(200)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "torn.parquet", row_group_size=50, use_dictionary=False)
    content = bytearray((tmp_path / "torn.parquet").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4000] = b"\xab" * 4000
    (tmp_path / "torn.parquet").write_bytes(content)
    assert pack(tmp_path / "torn.parquet", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"SOURCE: {tmp_path}/torn.parquet: cannot be read: " in error and error.count("\n") == 1


def test_a_bad_moment_of_the_file_system_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "TROUBLE_PAUSES_S", (0.01, 0.01))
    real, failures = files.open_regular, 2

    def open_regular(path: Path, **how: Any) -> Any:
        nonlocal failures
        if path.name == "2.img" and failures:
            failures -= 1
            raise OSError(errno.EIO, "Input/output error")
        return real(path, **how)

    monkeypatch.setattr(files, "open_regular", open_regular)
    table = write_table(tmp_path / "pairs.csv")
    assert pack(table, tmp_path / "out") == 0 and not failures
    assert list(samples(tmp_path / "out")) == kept()
    failures = 99
    assert pack(table, tmp_path / "gone") == 1
    assert "once the file system is well again, the same command resumes" in capsys.readouterr().err


@pytest.mark.parametrize("shard_size", [3, 5])
def test_a_killed_pack_continues(tmp_path: Path, shard_size: int) -> None:
    """Killed between any two tars and in the middle of one: the folder ends the same, to the byte."""
    table = write_table(tmp_path / "pairs.csv")
    words = ["--shard-size", str(shard_size)]
    assert pack(table, tmp_path / "whole", *words) == 0
    script = (
        "import os, sys, itertools\n"
        "from amclip_ds.data import pack\n"
        "count, real = itertools.count(1), pack._Shards.take\n"
        "def take(shards, row, sample):\n"
        "    real(shards, row, sample)\n"
        "    if next(count) == int(sys.argv.pop()): os.kill(os.getpid(), 9)\n"
        "pack._Shards.take = take\n"
        "from amclip_ds.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    ).replace("int(sys.argv.pop())", "STOP")
    argv = ["data", "pack", str(table), "--out", str(tmp_path / "out"), *words]
    for stop in (4, 6):
        killed = subprocess.run([sys.executable, "-c", script.replace("STOP", str(stop)), *argv], capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert main(argv) == 0
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    stamp = (tmp_path / "out" / "00000.tar").stat().st_mtime_ns
    assert main(argv) == 0 and (tmp_path / "out" / "00000.tar").stat().st_mtime_ns == stamp


def test_what_cannot_be_packed_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(source: Path | str, *words: str, out: str = "new") -> str:
        assert main(["data", "pack", str(source), "--out", str(tmp_path / out), *words]) == 2
        return capsys.readouterr().err

    table = write_table(tmp_path / "pairs.csv")
    assert "no such file or folder" in said("/nowhere")
    assert "hf download" in said("https://huggingface.co/datasets/x")
    assert "--image-key nope: " in said(table, "--image-key", "nope")
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    assert "name the column with --image-key: of 'a', 'b', none is known" in said(tmp_path / "odd.csv")
    (tmp_path / "two.csv").write_text("image,path,text\n1,2,3\n")
    assert "'image' and 'path' may each be meant" in said(tmp_path / "two.csv")
    (tmp_path / "urls.csv").write_text("image,text\nhttps://x/1.jpg,a\n")
    assert "img2dataset downloads them" in said(tmp_path / "urls.csv")
    (tmp_path / "cc3m.tsv").write_text("a cat\thttps://x/1.jpg\n")  # without a heading
    assert "'https://x/1.jpg' holds URLs; img2dataset downloads them" in said(tmp_path / "cc3m.tsv")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "1.jpg").write_bytes(picture(1))
    assert "1 images and no caption: put NAME.txt" in said(tmp_path / "bare")
    (tmp_path / "all.csv").write_text("image,text\nno.jpg,a\n")
    assert "none of 1 rows can be packed: left out: 1 rows: missing file" in said(tmp_path / "all.csv")
    assert not (tmp_path / "new").exists(), "or the corrected command would be refused"
    for name, text in {"none.csv": "", "none.jsonl": '{"image":"x"\n'}.items():
        (tmp_path / name).write_text(text)
        assert "no columns: it is empty, or its first line is not JSON" in said(tmp_path / name)
    pq.write_table(pa.table({"image": ["https://x"], "text": ["a"]}), tmp_path / "u.parquet")
    assert "is string, not bytes of images" in said(tmp_path / "u.parquet")
    pq.write_table(pa.table({"URL": ["https://x"], "TEXT": ["a"]}), tmp_path / "laion.parquet")
    assert "no column of images, and 'URL' holds URLs; img2dataset" in said(tmp_path / "laion.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1torn")
    assert "torn.parquet: " in said(tmp_path / "torn.parquet")
    (tmp_path / "x.zip").write_bytes(b"PK\3\4")
    assert "a zip archive: a folder, a table" in said(tmp_path / "x.zip")
    (tmp_path / "many.csv").write_text("image,text\n" + f"images/0.img,{'b' * 1000}\n" * 1100)
    assert "too large captions" in said(tmp_path / "many.csv")
    assert "holds something else" in said(table, out="bare")
    assert pack(table, tmp_path / "out") == 0
    (tmp_path / "out" / ".00001.tar.partial").touch()  # another pack is at it
    assert "holds a pack of something else (shard_size differ)" in said(table, "--shard-size", "7", out="out")
    assert (tmp_path / "out" / ".00001.tar.partial").exists()


@pytest.mark.parametrize(
    "name, content",
    [
        ("x.csv", b"a,b"),
        ("x.parquet", b"PAR1"),
        ("x.zip", b"PK\3\4"),
        ("x.jpg", b"\xff\xd8\xff"),
        ("x.arrow", b"ARROW1"),
        ("x.npz", b"\x93NUMPY"),
        ("x.h5", b"\x89HDF\r\n"),
        ("x.tfrecord", b""),
        ("x.json", b"{}"),
    ],
)
def test_every_wrong_kind_of_input_names_the_command(
    tmp_path: Path, name: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    for spec in (tmp_path / name, tmp_path):
        assert main(["train", "aclip-tiny", f"data.train={spec}", f"run.out={tmp_path}/run"]) == 2
        assert "`amclip data pack` makes them" in capsys.readouterr().err


@pytest.mark.parametrize("name, unpack", [("x.tar.gz", "gunzip"), ("x.tar.zst", "zstd -d"), ("x.tgz", "gunzip")])
def test_compressed_tars_are_named(tmp_path: Path, name: str, unpack: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_bytes(b"")
    assert main(["train", "aclip-tiny", f"data.train={tmp_path}/{name}", f"run.out={tmp_path}/run"]) == 2
    error = capsys.readouterr().err
    assert "a compressed tar" in error and unpack in error
