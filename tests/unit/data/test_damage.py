"""Every kind of damage, built for real: checked, indexed and trained on; read + skipped + lost = expected, always."""

import contextlib
import errno
import gzip
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from amclip_ds import files, processes
from amclip_ds.data import chunks
from amclip_ds.data.check import CheckConfig, CheckReport, check
from amclip_ds.errors import FAULT, MISTAKE, AmclipError
from amclip_ds.images import open_image
from amclip_ds.shards import index, reader
from tests.unit.data import damaged
from tests.unit.data.damaged import BLOCK, flip, header_at, json_fields, picture, sample, samples, special, tar_of
from tests.unit.data.shards import open_data, write_shards

WHOLE = tar_of(samples(range(10)))
LONG = "a" * 120


@dataclass(frozen=True)
class Case:
    """A shard and what must be said of it."""

    tar: Callable[[], bytes]
    account: tuple[int, int, int, int]
    """expected, read, skipped, lost"""
    kinds: dict[str, int]
    """every problem, and how often"""


def with_fourth(**members: bytes | None) -> Callable[[], bytes]:
    """Ten samples, of which number 4 is another."""
    return lambda: tar_of(samples(range(4)) + sample(4, **members) + samples(range(5, 10)))


def cut(content: bytes, stop: int) -> bytes:
    return content[:stop]


def hole(tar: bytes, first: str, last: str) -> bytes:
    """Zeros from one member's header to another's."""
    start, stop = header_at(tar, first), header_at(tar, last)
    return tar[:start] + bytes(stop - start) + tar[stop:]


CASES = {
    "whole": Case(lambda: WHOLE, (10, 10, 0, 0), {}),
    "whole, pax names": Case(
        lambda: tar_of([(f"é{LONG}/{n}", c) for n, c in samples(range(3))], tarfile.PAX_FORMAT), (3, 3, 0, 0), {}
    ),
    "whole, gnu names": Case(
        lambda: tar_of([(f"{LONG}/{n}", c) for n, c in samples(range(3))], tarfile.GNU_FORMAT), (3, 3, 0, 0), {}
    ),
    "two joined": Case(lambda: tar_of(samples(range(5))) + tar_of(samples(range(5, 10))), (10, 10, 0, 0), {"zeros": 1}),
    "cut in an image": Case(
        lambda: cut(WHOLE, header_at(WHOLE, "000009.jpg") + 712), (10, 9, 0, 1), {"truncated": 1, "swallowed": 1}
    ),
    "cut in a text": Case(
        lambda: cut(WHOLE, header_at(WHOLE, "000009.txt") + BLOCK + 5), (10, 9, 1, 0), {"truncated": 1, "no caption": 1}
    ),
    "cut in a header": Case(
        lambda: cut(WHOLE, header_at(WHOLE, "000007.jpg") + 100), (8, 7, 0, 1), {"truncated": 1, "swallowed": 1}
    ),
    "cut between samples": Case(
        lambda: cut(WHOLE, header_at(WHOLE, "000007.jpg")), (8, 7, 0, 1), {"truncated": 1, "swallowed": 1}
    ),
    "image header flipped": Case(
        lambda: damaged.with_flipped_headers(WHOLE, "000004.jpg"), (10, 9, 0, 1), {"header": 1, "swallowed": 1}
    ),
    "text header flipped": Case(
        lambda: damaged.with_flipped_headers(WHOLE, "000004.txt"), (10, 9, 1, 0), {"header": 1, "no caption": 1}
    ),
    "both headers flipped": Case(
        lambda: damaged.with_flipped_headers(WHOLE, "000004.jpg", "000004.txt"),
        (10, 9, 0, 1),
        {"header": 1, "swallowed": 1},
    ),
    "size beyond the end": Case(
        lambda: damaged.resized(WHOLE, "000004.jpg", 1 << 50), (5, 4, 0, 1), {"truncated": 1, "swallowed": 1}
    ),
    "a hole": Case(lambda: hole(WHOLE, "000004.jpg", "000005.txt"), (10, 8, 0, 2), {"zeros": 1, "swallowed": 2}),
    "doubled image": Case(with_fourth(jpg=picture(2)), (10, 10, 0, 0), {"duplicate": 1}),
    "doubled key": Case(
        lambda: tar_of(samples([0, 1]) + sample(1, jpg=picture(7))), (3, 3, 0, 0), {"duplicate key": 1}
    ),
    "missing caption": Case(with_fourth(txt=None), (10, 9, 1, 0), {"no caption": 1}),
    "empty caption": Case(with_fourth(txt=b" \n\t "), (10, 9, 1, 0), {"empty caption": 1}),
    "caption is not UTF-8": Case(with_fourth(txt=b"caf\xe9"), (10, 9, 1, 0), {"not utf-8": 1}),
    "caption from json": Case(with_fourth(txt=None, json=json_fields(caption="a cat")), (10, 10, 0, 0), {}),
    "json without captions": Case(with_fourth(txt=None, json=json_fields(url="x")), (10, 9, 1, 0), {"no caption": 1}),
    "broken json": Case(with_fourth(txt=None, json=b'{"caption": '), (10, 9, 1, 0), {"bad json": 1}),
    "deep json": Case(with_fourth(txt=None, json=b"[" * 200_000), (10, 9, 1, 0), {"bad json": 1}),
    "missing image": Case(with_fourth(jpg=None), (10, 9, 1, 0), {"no image": 1}),
    "empty image": Case(with_fourth(jpg=b""), (10, 9, 1, 0), {"broken image": 1}),
    "half a JPEG": Case(with_fourth(jpg=cut(picture(4), 400)), (10, 9, 1, 0), {"broken image": 1}),
    "half a PNG": Case(with_fourth(jpg=None, png=cut(picture(4, kind="PNG"), 900)), (10, 9, 1, 0), {"broken image": 1}),
    "half a WebP": Case(
        with_fourth(jpg=None, webp=cut(picture(4, kind="WEBP"), 60)), (10, 9, 1, 0), {"broken image": 1}
    ),
    "no image at all": Case(with_fourth(jpg=b"<html>404</html>"), (10, 9, 1, 0), {"broken image": 1}),
    "bomb": Case(
        lambda: tar_of(sample(0, jpg=None, png=damaged.bomb(9500)) + sample(1)), (2, 1, 1, 0), {"too large": 1}
    ),
    "giant text": Case(with_fourth(txt=b"a" * (2 << 20)), (10, 9, 1, 0), {"too large": 1}),
    "a word without end": Case(with_fourth(txt=b"a1b2" * 100_000), (10, 10, 0, 0), {}),
    "tiny image": Case(with_fourth(jpg=picture(4, (3, 2))), (10, 10, 0, 0), {"too small": 1}),
    "one pixel high": Case(with_fourth(jpg=picture(4, (900, 1))), (10, 10, 0, 0), {"too small": 1, "aspect": 1}),
    "stretched image": Case(with_fourth(jpg=picture(4, (700, 60))), (10, 10, 0, 0), {"aspect": 1}),
    "links and devices": Case(
        lambda: tar_of(
            [
                special("000003.jpg", tarfile.SYMTYPE, "/etc/passwd"),
                special("x.jpg", tarfile.LNKTYPE, "../../etc/x"),
                special("y.jpg", tarfile.CHRTYPE),
                special("z.jpg", tarfile.FIFOTYPE),
                special("d", tarfile.DIRTYPE),
                *samples(range(3)),
            ]
        ),
        (3, 3, 0, 0),
        {"link": 2},
    ),
    "a link that claims a size": Case(
        lambda: damaged.resized(tar_of([special("l.jpg", tarfile.SYMTYPE, "x"), *samples(range(3))]), "l.jpg", 4096),
        (3, 3, 0, 0),
        {"link": 1},
    ),
    "names that climb": Case(
        lambda: tar_of([(f"../../{n}", c) for n, c in sample(0)] + [(f"/etc/{n}", c) for n, c in samples([1, 2])]),
        (3, 3, 0, 0),
        {"hostile name": 3},
    ),
    "NUL in a long name": Case(
        lambda: tar_of([(LONG + n, c) for n, c in sample(0)], tarfile.GNU_FORMAT).replace(b"a000000.", b"\x00000000."),
        (1, 1, 0, 0),
        {"hostile name": 1},
    ),
    "a name that is not UTF-8": Case(
        lambda: damaged.renamed(WHOLE, "000004.jpg", b"\xff\xfe.jpg"), (11, 9, 2, 0), {"no caption": 1, "no image": 1}
    ),
    "hidden files": Case(lambda: tar_of([("._000000.jpg", b"Mac OS X"), *samples(range(3))]), (3, 3, 0, 0), {}),
    "empty tar": Case(lambda: tar_of([]), (0, 0, 0, 0), {"empty": 1}),
    "empty file": Case(lambda: b"", (0, 0, 0, 0), {"truncated": 1}),
    "not a tar": Case(lambda: b"<html>404 not found</html>" * 100, (0, 0, 0, 0), {"header": 1, "truncated": 1}),
    "gzipped": Case(lambda: gzip.compress(WHOLE, mtime=0), (0, 0, 0, 0), {"header": 1, "truncated": 1}),
}


def checked(path: Path, **settings: object) -> CheckReport:
    return check([str(path)], CheckConfig(**settings), processes=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CASES)
def test_every_sample_is_accounted_for(name: str, tmp_path: Path) -> None:
    case, shard = CASES[name], tmp_path / "00000.tar"
    shard.write_bytes(case.tar())
    report = checked(shard, max_skip_rate=0.0)
    found = report.as_json()
    account = tuple(found[key] for key in ("expected", "read", "skipped", "lost"))
    assert account == case.account, found
    assert account[0] == sum(account[1:])
    assert {p["kind"]: p["count"] for p in found["shards"][0]["problems"]} == case.kinds
    harmless = {"zeros", "duplicate key", "too small", "aspect", "hostile name", "link"}
    assert found["ok"] == found["shards"][0]["ok"] == (not set(case.kinds) - harmless)


@pytest.mark.parametrize("name", CASES)
def test_training_continues_and_counts_the_same(name: str, tmp_path: Path) -> None:
    """A damaged shard beside a whole one: the epoch goes through; what is replaced is what the check calls skipped."""
    case = CASES[name]
    (tmp_path / "bad.tar").write_bytes(case.tar())
    (tmp_path / "good.tar").write_bytes(tar_of(samples(range(100, 110))))
    report = checked(tmp_path / "bad.tar")
    data = open_data(tmp_path, global_batch=2, image_size=32, teacher_size=32, context_length=77)
    batches = data.batches()
    epoch = [next(batches) for _ in range(data.steps_per_epoch)]
    data.close()
    without_image = report.problems()["no image"]
    too_long = name == "giant text"  # left out by the index already
    in_index = len(index.Index(next(tmp_path.glob("amclip-index-*"))))
    assert in_index == 10 + report.total("read") + report.total("skipped") - without_image - too_long
    incidents = [incident for batch in epoch for incident in batch.incidents]
    replaced = {incident["key"] for incident in incidents if incident["action"] == "replaced"}
    seen = {number for batch in epoch for number in batch.sample_ids.tolist()}
    tail = data.samples_per_epoch - 2 * data.steps_per_epoch
    assert abs(len(replaced) - (report.total("skipped") - without_image - too_long)) <= tail
    assert len(seen) >= data.samples_per_epoch - len(replaced) - tail
    reported = {incident["kind"] for incident in incidents if incident["action"] == "left out of every epoch"}
    assert set(case.kinds) & {"truncated", "header", "zeros", "no image"} <= reported
    assert case.kinds or not incidents


def test_a_wrong_account_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above must fail for a reader that stops silently at the first damaged header, as tarfile does."""
    monkeypatch.setattr("amclip_ds.data.check.scan", lambda file, size: stop_at_damage(index.scan(file, size)))
    with pytest.raises(AssertionError):
        test_every_sample_is_accounted_for("image header flipped", tmp_path)


def stop_at_damage(found):  # type: ignore[no-untyped-def]
    for item in found:
        if not isinstance(item, index.Member):
            return
        yield item


def test_a_fixed_image_is_read_and_reported(tmp_path: Path) -> None:
    """A JPEG with a byte changed among its pixels: every viewer shows it, and so do we, but it is counted."""
    content = picture(4)
    changed = (flip(content, place, 1 << bit) for place in range(700, len(content) - 2) for bit in range(8))
    odd = next(image for image in changed if open_image(image).decode().damaged)
    (tmp_path / "00000.tar").write_bytes(tar_of(sample(0, jpg=odd) + sample(1)))
    report = checked(tmp_path / "00000.tar")
    assert report.total("read") == 2 and report.problems()["damaged image"] == 1


def test_promised_samples_are_expected(tmp_path: Path) -> None:
    shard = tmp_path / "00000.tar"
    shard.write_bytes(tar_of(samples(range(7))))
    (tmp_path / "sizes.json").write_text('{"00000.tar": 10}')
    report = checked(shard)
    assert report.as_json()["expected"] == 10 and report.total("lost") == 3 and not report.ok
    (tmp_path / "sizes.json").unlink()
    (tmp_path / "00000_stats.json").write_text('{"count": 12, "successes": 9}')
    assert checked(shard).total("lost") == 2
    (tmp_path / "00000_stats.json").write_text('{"successes": "broken')
    assert checked(shard).ok


def test_a_cut_shard_keeps_its_promise_once(tmp_path: Path) -> None:
    """Damage that shows and a promise are not counted twice."""
    shard = tmp_path / "00000.tar"
    shard.write_bytes(cut(WHOLE, header_at(WHOLE, "000006.jpg") + BLOCK + 200))
    (tmp_path / "sizes.json").write_text('{"00000.tar": 10}')
    report = checked(shard)
    assert (report.total("expected"), report.total("read"), report.total("lost")) == (10, 6, 4)


def die_on(item: int) -> int:
    if item == 3:
        import os

        os._exit(1)
    return item * item


def test_a_shard_that_kills_its_reader_is_named() -> None:
    found = list(processes.map_in_processes(die_on, range(6), processes=2))
    assert [isinstance(item, processes.WorkerCrashed) for item in found] == [False] * 3 + [True] + [False] * 2
    assert [item for item in found if not isinstance(item, processes.WorkerCrashed)] == [0, 1, 4, 16, 25]


def test_an_unreadable_shard_is_reported(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(WHOLE)
    report = check([str(tmp_path / "00000.tar"), str(tmp_path / "gone.tar")], CheckConfig(), processes=1)
    assert report.problems()["unreadable"] == 1 and not report.ok and report.total("read") == 10


def test_flipping_any_header_byte_loses_nothing_silently(tmp_path: Path) -> None:
    """Every byte of one header, one at a time: the sum holds, and where a sample is missing it is reported."""
    start, shard = header_at(WHOLE, "000004.jpg"), tmp_path / "00000.tar"
    for offset in [*range(0, 12), *range(95, 165), 257, 300, 400, 511]:
        shard.write_bytes(flip(WHOLE, start + offset, 0x05))
        report = checked(shard)
        assert report.total("expected") == report.total("read") + report.total("skipped") + report.total("lost")
        assert report.total("read") == 10 or report.problems(), offset
        assert report.total("read") >= 9


def test_trouble_of_the_file_system_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Waited for, and no sample is replaced; where it lasts, the machine's code."""
    write_shards(tmp_path / "data", (20, 20))
    with contextlib.closing(open_data(tmp_path / "data")) as data:
        undisturbed = next(data.batches(None))
    monkeypatch.setattr(reader, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(files, "TROUBLE_PAUSES_S", (0.001,) * 3)
    pread, failures = os.pread, [errno.EIO] * 30

    def failing(file: int, size: int, at: int) -> bytes:
        if failures:
            raise OSError(failures.pop(), "Input/output error")
        return pread(file, size, at)

    monkeypatch.setattr(os, "pread", failing)
    with contextlib.closing(open_data(tmp_path / "data")) as data:
        batch = next(data.batches(None))
    assert not failures and torch.equal(batch.sample_ids, undisturbed.sample_ids)
    assert {row["kind"] for row in batch.incidents} == {"retried"}
    assert "Input/output error; tried again for" in capfd.readouterr().err

    failures[:] = [errno.EIO] * 10_000
    with (
        contextlib.closing(open_data(tmp_path / "data")) as data,
        pytest.raises(AmclipError, match=r"cannot be read: Input/output error; once the file system is well") as caught,
    ):
        next(data.batches(None))
    assert caught.value.exit_code == FAULT


@pytest.mark.parametrize("number", [errno.ESHUTDOWN, errno.ENOTCONN, errno.EREMOTEIO, errno.EKEYEXPIRED])
def test_what_other_file_systems_call_it_is_outlasted_too(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path / "data", (20, 20))
    monkeypatch.setattr(reader, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(files, "TROUBLE_PAUSES_S", (0.001,) * 3)
    pread, failures = os.pread, [number] * 14

    def failing(file: int, size: int, at: int) -> bytes:
        if failures:
            raise OSError(failures.pop(), os.strerror(number))
        return pread(file, size, at)

    monkeypatch.setattr(os, "pread", failing)
    with contextlib.closing(open_data(tmp_path / "data")) as data:
        assert {row["kind"] for row in next(data.batches(None)).incidents} == {"retried"} and not failures


@pytest.mark.parametrize("shards", [(20, 20), (40,)])
def test_nothing_of_several_shards_for_one_reason_is_no_damage(
    shards: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ticket that has expired, a mount that is gone: no sample is replaced. Of one shard alone nobody can say."""
    write_shards(tmp_path / "data", shards)

    def failing(file: int, size: int, at: int) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    with contextlib.closing(open_data(tmp_path / "data")) as data:
        monkeypatch.setattr(os, "pread", failing)
        with pytest.raises(AmclipError, match=r"Permission denied") as caught:
            next(data.batches(None))
    several = "data.train: 2 shards cannot be read, the first .*Permission denied; once it can be read again"
    assert bool(re.match(several, str(caught.value))) == (len(shards) > 1)
    assert caught.value.exit_code == (FAULT if len(shards) > 1 else MISTAKE)


def test_a_shard_that_is_gone_costs_its_own_samples(tmp_path: Path) -> None:
    """The twin: others can be read."""
    write_shards(tmp_path / "data", (20, 20))
    with contextlib.closing(open_data(tmp_path / "data")) as data:
        (tmp_path / "data" / "1.tar").unlink()
        batch = next(data.batches(None))
    assert {(row["kind"], row["cause"]) for row in batch.incidents} == {("unreadable", "missing")}
    assert set(batch.sample_ids.tolist()) <= set(range(20))


@pytest.mark.parametrize("shards", [(20, 20), (40,)])
def test_a_bad_place_of_a_disk_costs_one_sample(
    shards: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever it is, and of one shard alone too, whose neighbours are read together with it."""
    write_shards(tmp_path / "data", shards)
    monkeypatch.setattr(reader, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(files, "TROUBLE_PAUSES_S", (0.001,) * 3)
    monkeypatch.setattr(chunks, "AGAIN_S", (0.001,))
    with contextlib.closing(open_data(tmp_path / "data")) as data:
        undisturbed = next(data.batches(None))
        bad = [data.index.sample(int(number)).image[0] for number in undisturbed.sample_ids]
    pread = os.pread
    for lost, number in enumerate(undisturbed.sample_ids.tolist()):

        def failing(file: int, size: int, at: int, lost: int = lost, shard: int = number // shards[0]) -> bytes:
            if at <= bad[lost] < at + size and os.readlink(f"/proc/self/fd/{file}").endswith(f"{shard}.tar"):
                raise OSError(errno.EIO, "Input/output error")
            return pread(file, size, at)

        with monkeypatch.context() as patched, contextlib.closing(open_data(tmp_path / "data")) as data:
            patched.setattr(os, "pread", failing)
            batch = next(data.batches(None))
        assert [row["kind"] for row in batch.incidents if row["kind"] != "retried"] == ["unreadable"], number
        places = range(len(batch.sample_ids))
        assert (batch.sample_ids != undisturbed.sample_ids).tolist() == [place == lost for place in places], number
