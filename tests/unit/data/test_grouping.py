"""What a sample is: index, check, training and evaluation see the same, and every image is in the account."""

import contextlib
import io
from pathlib import Path

import pytest

from amclip_ds import cli
from amclip_ds.data.check import CheckConfig, CheckReport, check
from amclip_ds.data.config import DataConfig
from amclip_ds.data.ledger import Ledger
from amclip_ds.data.loader import TrainingData
from amclip_ds.errors import UserError
from amclip_ds.evaluate.datasets import open_set
from amclip_ds.shards.account import account_of
from amclip_ds.shards.grouping import ADVICE, MAX_TEXT_BYTES, Group, group, scattered
from amclip_ds.shards.index import Index, build_index
from amclip_ds.shards.tar import Damage, scan
from tests.unit.data.damaged import File, picture, sample, samples, tar_of
from tests.unit.data.shards import open_data


def put(folder: Path, files: list[File], name: str = "0.tar") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(tar_of(files))
    return folder / name


def groups_of(files: list[File]) -> list[Group]:
    content = tar_of(files)
    return [item for item in group(scan(io.BytesIO(content), len(content))) if isinstance(item, Group)]


def checked(shard: Path, **settings: object) -> CheckReport:
    return check([str(shard)], CheckConfig(**settings), 1)  # type: ignore[arg-type]


def training(shard: Path, **settings: object) -> TrainingData:
    return TrainingData(
        DataConfig(train=str(shard), workers=0, **settings),
        seed=0,
        global_batch=2,
        rank=0,
        world_size=1,  # type: ignore[arg-type]
        image_size=16,
        teacher_size=None,
        num_units=0,
        context_length=77,
        say=lambda text: None,
    )


def scans(count: int) -> list[File]:
    """Images numbered behind a dot: webdataset's rule makes one key of them."""
    return [
        file
        for number in range(count)
        for file in ((f"scan.{number:04d}.jpg", picture(100 + number)), (f"scan.{number:04d}.txt", b"words"))
    ]


def test_surplus_images_are_counted_named_and_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """200 scans behind one key beside 100 plain samples: 101 samples, 199 images that none has."""
    shard = put(tmp_path / "data", samples(range(100)) + scans(200))
    report = checked(shard)
    assert report.problems()["surplus image"] == 199 and not report.ok
    assert report.shards[0].problems["surplus image"] == ("scan.0001.jpg", 199)
    found = report.as_json()
    assert [found[key] for key in ("images", "expected", "read", "skipped", "lost")] == [300, 300, 101, 199, 0]
    assert report.samples_in_an_epoch() == 101
    with pytest.raises(UserError, match=r"surplus image: 199 of 300 images .*scan\.0001\.jpg in .*0\.tar; .*first dot"):
        training(shard)
    with contextlib.closing(training(shard, max_skip_rate=0.7)) as data:
        assert data.samples_per_epoch == 101
        assert str(data.account) == "300 images in the shards = 101 samples + 199 surplus image"
        assert Ledger(0.7, images=data.account).summary().endswith(f"; {data.account}")
    assert cli.main(["data", "check", str(shard), "--workers", "1"]) == 2
    printed = capsys.readouterr().out
    assert "surplus image: 199 in all, the first scan.0001.jpg in " in printed and ADVICE["surplus image"] in printed
    assert "300 images = 101 read + 199 surplus + 0 unusable" in printed


def test_all_that_has_no_place_counts_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images of a type that nobody reads and of texts that are too large: none alone is above the rate, which the
    check goes by too."""
    unread = [(f"u{number:03d}.{suffix}", b"II*\0" * 9) for number in range(15) for suffix in ("tif", "txt")]
    large = [
        (f"v{number:03d}.{suffix}", content)
        for number in range(15)
        for suffix, content in (("jpg", picture(number)), ("json", b'{"a": "' + b"x" * MAX_TEXT_BYTES + b'"}'))
    ]
    shard = put(tmp_path / "data", samples(range(50)) + unread + large)
    with pytest.raises(UserError) as refused:
        training(shard, max_skip_rate=0.3)
    assert "data.train: 15 unread type and 15 too large: 30 of 80 images cannot be trained on" in str(refused.value)
    assert "the first is u000.tif in " in str(refused.value) and "JPEG, PNG and WebP are read" in str(refused.value)
    report = checked(shard, max_skip_rate=0.3)
    assert not report.ok and report.total("images") == 80 and report.total("skipped") == 30
    with contextlib.closing(training(shard, max_skip_rate=0.4)) as data:
        assert str(data.account) == "80 images in the shards = 50 samples + 15 unread type + 15 too large"
    assert checked(shard, max_skip_rate=0.4).ok


def test_a_few_surplus_images_are_reported_and_trained_beside(tmp_path: Path) -> None:
    shard = put(tmp_path, samples(range(100)) + [("000099.thumb.jpg", picture(7))])
    assert checked(shard).ok and checked(shard).problems() == {"surplus image": 1}
    said: list[str] = []
    data = open_data(shard, global_batch=2, teacher_size=None, num_units=0, context_length=77, say=said.append)
    data.close()
    assert "data: 101 images in the shards = 100 samples + 1 surplus image" in said


def test_a_sampled_check_sees_surplus_images_too(tmp_path: Path) -> None:
    shard = put(tmp_path, samples(range(100)) + scans(30))
    report = checked(shard, sample=0.1)
    assert report.problems()["surplus image"] == 29 and not report.ok
    assert report.total("expected") == report.total("read") + report.total("skipped") + report.total("lost")


def test_the_exact_suffix_comes_first_everywhere(tmp_path: Path) -> None:
    [one] = groups_of(
        [
            ("a.input.jpg", b"i"),
            ("a.outputs.txt", b"o"),
            ("a.JPG", b"jj"),
            ("a.txt", b"ttt"),
            ("a.x.json", b"{}"),
            ("a.json", b"{ }"),
        ]
    )
    assert [image.name for _, image in one.images()] == ["a.JPG", "a.input.jpg"]
    members = [one.member(kind) for kind in ("txt", "json", "cls")]
    assert [member.name if member else None for member in members] == ["a.txt", "a.json", None]


def test_inputs_and_outputs_are_samples_to_all(tmp_path: Path) -> None:
    """`N.input.jpg` beside `N.outputs.txt`: what the check says is what training does, and evaluation."""
    files = [
        (f"{number:03d}.{suffix}", content)
        for number in range(8)
        for suffix, content in (
            ("input.jpg", picture(number)),
            ("outputs.txt", b"picture %d" % number),
            ("n.cls", b"%d" % (number % 2)),
        )
    ]
    shard = put(tmp_path / "data", files)
    report = checked(shard)
    assert report.total("read") == 8 and not report.problems()
    index = build_index([str(shard)], tmp_path / "index", 1)
    assert len(index) == 8 and not index.shards[0].problems
    with contextlib.closing(training(shard)) as data:
        assert not [row for batch in (next(data.batches()) for _ in range(4)) for row in batch.incidents]
    (tmp_path / "data" / "classnames.txt").write_text("even\nodd\n")
    captioned = open_set(str(shard), task="retrieval")
    assert [one.captions for one in captioned.samples] == [(f"picture {number}",) for number in range(8)]
    labelled = open_set(str(tmp_path / "data"), task="zeroshot_classification", templates="openai-7")
    assert [one.label for one in labelled.samples] == [0, 1] * 4
    assert [one.key for one in labelled.samples] == [index.key(number) for number in range(8)]
    assert [(one.offset, one.size) for one in labelled.samples] == [index.sample(n).image for n in range(8)]


def test_members_that_are_not_adjacent_are_named_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All images first, then all texts."""
    files = samples(range(20))
    shard = put(tmp_path, sorted(files, key=lambda file: file[0].endswith("txt")))
    report = checked(shard)
    assert report.problems() == {"not adjacent": 20}
    found = report.as_json()
    assert [found[key] for key in ("images", "expected", "read", "skipped", "lost")] == [20, 20, 0, 20, 0]
    index = build_index([str(shard)], tmp_path / "index", 1)
    assert index.shards[0].problems == [{"kind": "not adjacent", "key": "000000", "count": 20}]
    for refused in (lambda: training(shard), lambda: open_set(str(shard), task="retrieval")):
        with pytest.raises(UserError, match=r"0\.tar.*not adjacent: pack with tar --sort=name"):
            refused()
    assert cli.main(["data", "check", str(shard), "--workers", "1"]) == 2
    assert ADVICE["not adjacent"] in capsys.readouterr().out


def test_a_json_that_is_apart_costs_nothing_where_the_caption_does_not(tmp_path: Path) -> None:
    files = samples(range(10)) + [(f"{number:06d}.json", b"{}") for number in range(10)]
    report = checked(put(tmp_path, files))
    assert report.total("read") == 10 and report.ok and report.problems() == {"not adjacent": 10}
    with contextlib.closing(training(tmp_path / "0.tar")) as data:
        assert data.samples_per_epoch == 10


ODD = {
    "uppercase": ([("A.JPG", picture(0)), ("A.TXT", b"a")], 1, {}),
    "jpeg": ([("a.jpeg", picture(0)), ("a.txt", b"a")], 1, {}),
    "txt and json": ([("a.jpg", picture(0)), ("a.txt", b"a"), ("a.json", b'{"caption": "b"}')], 1, {}),
    "dots in a folder": ([("v1.0.2/a.jpg", picture(0)), ("v1.0.2/a.txt", b"a")], 1, {}),
    "./ before": ([("./a.jpg", picture(0)), ("./a.txt", b"a")], 1, {}),
    "absolute": ([("/a.jpg", picture(0)), ("/a.txt", b"a")], 1, {"hostile name": 1}),
    "one name in two folders": (
        [
            (f"{folder}/a.{suffix}", content)
            for folder in "xy"
            for suffix, content in (("jpg", picture(ord(folder))), ("txt", b"a"))
        ],
        2,
        {},
    ),
    "macOS": (
        [
            ("._a.jpg", b"Mac"),
            ("a.jpg", picture(0)),
            ("a.txt", b"a"),
            (".DS_Store", b"x"),
            ("__MACOSX/._a.jpg", b"Mac"),
            ("__MACOSX/._a.txt", b"Mac"),
        ],
        1,
        {},
    ),
    "a hidden image": (
        [(".jpg", picture(0)), (".hidden.PNG", picture(1)), ("a.jpg", picture(2)), ("a.txt", b"a")],
        1,
        {"hidden image": 2},
    ),
    "two spellings of one letter": ([("é.jpg", picture(0)), ("e\u0301.txt", b"a")], 1, {}),
    "an image of another kind too": (
        [("a.jpg", picture(0)), ("a.png", picture(1, kind="PNG")), ("a.txt", b"a")],
        1,
        {"surplus image": 1},
    ),
    "several texts": ([("a.jpg", picture(0)), ("a.0.txt", b"a"), ("a.1.txt", b"b")], 1, {"surplus caption": 1}),
    "a mask": (
        [("a.seg.png", picture(1, kind="PNG")), ("a.jpg", picture(0)), ("a.txt", b"a")],
        1,
        {"surplus image": 1},
    ),
    "empty members": ([("a.jpg", b""), ("a.txt", b""), *sample(1)], 1, {"broken image": 1}),
    "one key far apart, whole each time": (sample(1) + sample(2) + sample(1, jpg=picture(9)), 3, {"duplicate key": 1}),
    "nothing": ([], 0, {"empty": 1}),
    "folders of hidden files alone": ([("a/.x", b"x")], 0, {"empty": 1}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_names(name: str, tmp_path: Path) -> None:
    files, read, problems = ODD[name]
    shard = put(tmp_path, files)
    report = checked(shard)
    assert (report.total("read"), dict(report.problems())) == (read, problems)
    index = build_index([str(shard)], tmp_path / "index", 1)
    assert len(index) == read + problems.get("broken image", 0)
    images = sum(
        not item[0].rpartition("/")[2].startswith(".") and item[0].lower()[-4:] in (".jpg", "jpeg", ".png")
        for item in files
    )
    assert report.total("images") == images == account_of(index.shards).images


def test_an_image_of_a_kind_that_is_not_read_is_named(tmp_path: Path) -> None:
    files = [("a.gif", b"GIF89a"), ("a.txt", b"a"), ("b.TIFF", b"II*\0"), *samples(range(3))]
    report = checked(put(tmp_path, files))
    assert report.problems() == {"no image": 2} and report.total("read") == 3
    assert report.causes() == {
        "has a .gif; JPEG, PNG, WebP are read": 1,
        "has a .tiff; JPEG, PNG, WebP are read": 1,
    }


def test_a_sample_over_two_shards_is_two_halves(tmp_path: Path) -> None:
    put(tmp_path, [*samples([0]), ("000001.jpg", picture(1))])
    put(tmp_path, [("000001.txt", b"words"), *samples([2])], "1.tar")
    report = check([str(tmp_path / "0.tar"), str(tmp_path / "1.tar")], CheckConfig(), 1)
    assert report.problems() == {"no caption": 1, "no image": 1} and report.total("read") == 2


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.nightly)])
def test_many_members_of_one_key_take_seconds(count: int, tmp_path: Path) -> None:
    """Nothing grows with the square of their number."""
    empty = tar_of([("scan.000000.jpg", b"")])[:512]
    block = bytearray(empty)
    with (tmp_path / "0.tar").open("wb") as file:
        for number in range(count):
            block[5:11] = b"%06d" % number
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
            file.write(block)
        file.write(bytes(1024))
    report = checked(tmp_path / "0.tar")
    assert report.total("images") == count and report.problems()["surplus image"] == count - 1
    index = build_index([str(tmp_path / "0.tar")], tmp_path / "index", 1)
    assert account_of(index.shards).images == count


def mixture(folder: Path) -> Path:
    """A tar of everything: whole, surplus, apart, blank, broken, too large a text, hidden, doubled, no image."""
    apart = samples(range(300, 303))
    return put(
        folder,
        [
            *samples(range(40)),
            *scans(6),
            *[file for file in apart if file[0].endswith("jpg")],
            *sample(50, txt="\u200b\0 ".encode()),
            *sample(51, txt=None),
            *sample(52, jpg=b"<html>"),
            *sample(53, jpg=None),
            *sample(54, txt=b"x" * (2 << 20)),
            *sample(55, txt=b"caf\xe9"),
            *sample(56, txt=None, json=b"{"),
            ("57.input.jpg", picture(57)),
            ("57.outputs.txt", b"words"),
            ("._58.jpg", b"Mac"),
            *sample(3, jpg=picture(60)),
            *[file for file in apart if file[0].endswith("txt")],
        ],
    )


def test_the_account_of_a_mixture_is_whole(tmp_path: Path) -> None:
    """images in the tar = read + surplus + unusable in the check, = samples + left out in training; every one named."""
    shard = mixture(tmp_path)
    content = shard.read_bytes()
    names = [m.name for m in scan(io.BytesIO(content), len(content)) if not isinstance(m, Damage)]
    images = sum(name.endswith(".jpg") and not name.startswith(".") for name in names)
    report = checked(shard, max_skip_rate=1)
    found = report.problems()
    unusable = ("not adjacent", "empty caption", "no caption", "broken image", "too large", "not utf-8", "bad json")
    assert {kind: found[kind] for kind in unusable} == {
        "not adjacent": 3,
        "empty caption": 1,
        "no caption": 1,
        "broken image": 1,
        "too large": 1,
        "not utf-8": 1,
        "bad json": 1,
    }
    assert report.total("images") == images == report.total("read") + 5 + 9
    assert report.total("skipped") == 5 + 9 + found["no image"] and found["no image"] == 1
    assert report.account() == f"{images} images = {report.total('read')} read + 5 surplus + 9 unusable"
    with contextlib.closing(training(shard, max_skip_rate=1)) as data:
        account = data.account
        assert account.images == images == account.samples + 5 + 1 and account.scattered == 3
        stream, ledger, bad = data.batches(), Ledger(1.0, images=account), {}
        for _ in range(3 * data.steps_per_epoch):  # three epochs, for an epoch leaves out its tail
            batch = next(stream)
            ledger.account(batch)
            bad |= {row["key"]: row["kind"] for row in batch.incidents if row["action"] == "replaced"}
        ledger.settle()
    assert len(bad) == 8 and set(bad.values()) == {
        "no caption",
        "empty caption",
        "unreadable",
        "not utf-8",
        "bad json",
    }
    assert ledger.total.skipped < ledger.total.tried == ledger.total.seen + ledger.total.skipped
    assert f"{images} images in the shards = {account.samples} samples + " in ledger.summary()


def test_images_that_no_account_names_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a group that forgets its surplus fails the account."""
    really = Group.images
    monkeypatch.setattr(Group, "images", lambda self: really(self)[:1])
    with pytest.raises(AssertionError):
        test_the_account_of_a_mixture_is_whole(tmp_path)


def test_an_evaluation_set_with_more_images_than_samples_is_refused(tmp_path: Path) -> None:
    files = [*sample(0, cls=b"0"), ("000000.other.jpg", picture(5))]
    with pytest.raises(UserError, match=r"0\.tar: 000000 has 2 images, 000000\.other\.jpg too"):
        open_set(str(put(tmp_path, files)), task="retrieval")


def test_an_evaluation_set_does_not_guess_which_text_counts(tmp_path: Path) -> None:
    files = [*sample(0, txt=None), ("000000.a.txt", b"a"), ("000000.b.txt", b"b")]
    with pytest.raises(UserError, match=r"000000 has several \.txt members and none is 000000\.txt"):
        open_set(str(put(tmp_path, files)), task="retrieval")
    files = [*sample(0), ("000000.a.txt", b"a"), *sample(1)]
    assert open_set(str(put(tmp_path, files, "1.tar")), task="retrieval").samples[0].captions == ("picture number 0",)


@pytest.mark.parametrize("label, said", [("²", "not a label"), ("٣", "not a label"), ("9" * 5000, "not a label")])
def test_a_label_is_a_number_of_ascii_digits(label: str, said: str, tmp_path: Path) -> None:
    put(tmp_path, sample(0, cls=label.encode()))
    (tmp_path / "classnames.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=said):
        open_set(str(tmp_path), task="zeroshot_classification", templates="openai-7")


def test_ordinary_shards_keep_their_ids(tmp_path: Path) -> None:
    """Keys, offsets and sizes of a usual tar are those that an index always had."""
    shard = put(tmp_path, samples(range(5)))
    index = Index(build_index([str(shard)], tmp_path / "index", 1).folder)
    assert [index.key(number) for number in range(5)] == [f"{number:06d}" for number in range(5)]
    assert not scattered(groups_of(samples(range(5))))
