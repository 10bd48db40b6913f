"""Shards from strangers: bombs are refused by their header, names are never paths, pickles and links never opened."""

import io
import multiprocessing
import resource
import tarfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from amclip_ds import cli
from amclip_ds.data.check import CheckConfig, check
from amclip_ds.data.config import DataConfig
from amclip_ds.images import BadImage, open_image
from amclip_ds.jsonl import read_lines
from amclip_ds.record import LogConfig, Record
from amclip_ds.shards import index
from amclip_ds.shards.tar import scan
from tests.unit.data import damaged
from tests.unit.data.damaged import sample, samples, special, tar_of
from tests.unit.data.shards import encode, open_data


def grown_by(work: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """(MB by which the peak memory of a fresh process grew, result) of a call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(theirs, work, args))
    process.start()
    assert ours.poll(120), "no answer"
    answer = ours.recv()
    process.join(20)
    return answer


def _measured(answers: Connection, work: Callable[..., Any], args: tuple) -> None:
    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    open_image(damaged.picture(0)).decode()  # what the decoders load at first use is not the image's
    open_image(damaged.picture(0, kind="PNG")).decode()
    before = peak()
    result = work(*args)
    answers.send(((peak() - before) / 1024, result))


def opened(content: bytes, limit: int) -> str:
    try:
        return str(open_image(content, limit).decode().pixels.shape)
    except BadImage as error:
        return error.kind


def checked(path: str) -> dict[str, int]:
    return dict(check([path], CheckConfig(), processes=1).problems())


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    """13000 x 13000, half a megabyte packed, 507 MB unpacked."""
    content = damaged.bomb(13000)
    assert 450_000 < len(content) < 550_000
    grown, said = grown_by(opened, content, DataConfig().max_pixels)
    assert said == "too large" and grown < 20
    (tmp_path / "bomb.tar").write_bytes(tar_of(sample(0, jpg=None, png=content) + sample(1)))
    grown, said = grown_by(checked, str(tmp_path / "bomb.tar"))
    assert said == {"too large": 1} and grown < 20


def test_the_measurement_sees_a_decoded_bomb() -> None:
    grown, said = grown_by(opened, damaged.bomb(5000), 1 << 30)
    assert said == "(5000, 5000, 3)" and grown > 70
    assert grown_by(opened, damaged.bomb(5000), 24_999_999)[1] == "too large"


@pytest.mark.slow
@pytest.mark.parametrize("mode, exif", [("RGBA", 6), pytest.param("I;16", 1, marks=pytest.mark.nightly)])
def test_the_largest_image_takes_less_than_a_gigabyte(mode: str, exif: int) -> None:
    """88 million pixels, of 4 or 2 bytes each; as an array for training, and as a picture for evaluation."""
    orientation = Image.Exif()
    orientation[0x0112] = exif
    size = (9400, 9400)
    largest = Image.fromarray(np.zeros(size, np.uint16)) if mode == "I;16" else Image.new(mode, size)
    content = encode(largest, "PNG", compress_level=1, exif=orientation)
    for work in (decoded, shown):
        grown, shape = grown_by(work, content)
        assert shape == size and grown < 980, (work, grown)


def decoded(content: bytes) -> tuple[int, ...]:
    return open_image(content).decode().pixels.shape[:2]


def shown(content: bytes) -> tuple[int, ...]:
    return open_image(content).picture().size


def test_a_jpeg_that_keeps_a_decoder_busy_is_refused() -> None:
    """Each scan of a progressive JPEG is a pass over all pixels and can be a few bytes long: a megabyte holds hours."""
    encoded = io.BytesIO()
    Image.new("RGB", (640, 480)).save(encoded, "JPEG", progressive=True)
    content = encoded.getvalue()
    last_scan = content[content.rindex(b"\xff\xda") : -2]

    def with_scans(count: int) -> bytes:
        return content[:-2] + last_scan * count + content[-2:]

    assert opened(with_scans(20), 1 << 30) == "(480, 640, 3)"
    assert len(with_scans(20_000)) < 1 << 20
    assert opened(with_scans(20_000), 1 << 30) == "unreadable"


def test_a_member_that_claims_terabytes_takes_no_memory(tmp_path: Path) -> None:
    """A sparse file of a terabyte is a few blocks on disk; reading the member would end the run."""
    shard = tmp_path / "00000.tar"
    whole = tar_of(samples(range(3)))
    shard.write_bytes(damaged.resized(whole, "000001.jpg", 1 << 40))
    with shard.open("r+b") as file:
        file.truncate((1 << 40) + len(whole))
    assert shard.stat().st_blocks < 1000
    grown, said = grown_by(checked, str(shard))
    assert said["too large"] == 1 and grown < 20


def hostile_tar(outside: Path) -> bytes:
    """Names that climb, absolute names, links to follow, NULs, pickles under every name that decoders know."""
    trap = damaged.pickled_trap(outside / "unpickled")
    names = ["../../x", "/etc/x", str(outside / "x"), "a/../../../x", "..", "./x", "~/x", "$HOME/x", "|touch x", "a\nb"]
    files: list[Any] = [
        special("link", tarfile.SYMTYPE, str(outside)),
        special("link.jpg", tarfile.SYMTYPE, str(outside / "secret")),
        special("hard.jpg", tarfile.LNKTYPE, str(outside / "secret")),
        special("null.jpg", tarfile.CHRTYPE),
        special("pipe.jpg", tarfile.FIFOTYPE),
    ]
    for number, name in enumerate(names):
        files += [
            (f"{name}{suffix}", content)
            for suffix, content in (
                (".jpg", damaged.picture(number)),
                (".txt", b"words"),
                (".pyd", trap),
                (".pkl", trap),
                (".pth", trap),
                (".npy", trap),
                (".pt", trap),
                (".pickle", trap),
            )
        ]
    files.append(("link/x.jpg", damaged.picture(50)))
    files.append(("link/x.txt", b"words"))
    return tar_of(files, tarfile.GNU_FORMAT)


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_names_are_never_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Index, check, stats and training of the worst tar: nothing appears but what was asked for."""
    outside, work, out = tmp_path / "outside", tmp_path / "work" / "deep" / "er", tmp_path / "out"
    for folder in (outside, work, out):
        folder.mkdir(parents=True)
    (outside / "secret").write_text("secret")
    (work / "00000.tar").write_bytes(hostile_tar(outside))
    monkeypatch.chdir(work)
    before = tree(tmp_path)
    assert cli.main(["data", "index", "00000.tar", "--out", str(out / "index")]) == 0
    assert cli.main(["data", "check", "00000.tar", "--json", str(out / "check.json"), "--max-skip-rate", "1"]) == 0
    assert cli.main(["data", "stats", "00000.tar", "--json", str(out / "stats.json"), "--out", str(out / "stats")]) == 0
    data = open_data(
        "00000.tar",
        global_batch=2,
        teacher_size=None,
        num_units=0,
        context_length=77,
        index=str(out / "index"),
        stage_dir=str(out / "stage"),
    )
    batches = data.batches()
    for _ in range(data.steps_per_epoch):
        next(batches)
    data.close()
    appeared = tree(tmp_path) - before
    assert {name.split("/")[0] for name in appeared} == {"out"}, appeared
    assert {name.split("/")[1] for name in appeared if name.count("/") == 1} == {
        "index",
        "check.json",
        "stats.json",
        "stats",
        "stage",
    }
    assert not Path("/etc/x.jpg").exists() and (outside / "secret").read_text() == "secret"


def test_the_trap_would_have_been_seen(tmp_path: Path) -> None:
    import pickle

    pickle.loads(damaged.pickled_trap(tmp_path / "unpickled"))
    assert tree(tmp_path) == {"unpickled"}


def test_links_and_devices_are_no_members() -> None:
    content = hostile_tar(Path("/nowhere"))
    names = [member.name for member in scan(io.BytesIO(content), len(content)) if isinstance(member, index.Member)]
    assert not [name for name in names if name in ("link", "link.jpg", "hard.jpg", "null.jpg", "pipe.jpg")]
    assert len(names) == 82


EVIL = "\x1b]0;owned\x07[red]a"


def test_names_reach_terminal_and_record_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences, markup and bytes that are not UTF-8 stay text, on the screen and in incidents.jsonl."""
    files = [(f"{EVIL}.jpg", b"no image"), (f"{EVIL}.txt", b"words"), (f"{EVIL}b.txt", b"words"), *samples(range(4))]
    content = damaged.renamed(tar_of(files), "000000.jpg", b"\xff\x1b[2J.jpg")
    content = damaged.renamed(content, "000000.txt", b"\xff\x1b[2J.txt").replace(
        damaged.picture(0)[200:300], bytes(100)
    )
    (tmp_path / "00000.tar").write_bytes(content)
    assert cli.main(["data", "check", str(tmp_path / "00000.tar")]) == 2
    assert cli.main(["data", "index", str(tmp_path / "00000.tar")]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x07" not in printed and r"\x1b]0;owned\x07[red]a" in printed.replace("\n", "")
    data = open_data(tmp_path, global_batch=5, teacher_size=None, num_units=0, context_length=77)
    incidents = next(data.batches()).incidents
    with record_of(tmp_path) as record:
        for incident in incidents:
            record.incident(**incident)
        record.incident("test", "half a pair: \ud800")
    rows = read_lines(tmp_path / "incidents.jsonl")
    assert {row["key"] for row in rows} >= {r"\x1b]0;owned\x07[red]a", r"\x1b]0;owned\x07[red]ab"}
    assert rows[-1]["cause"] == "half a pair: \ud800" and len(rows) == len(incidents) + 1
    assert "\x1b" not in (tmp_path / "incidents.jsonl").read_text()


def record_of(folder: Path) -> Record:
    config = LogConfig(tensorboard=False)
    return Record(folder, config, rank=0, world_size=1, attempt=0, total_steps=1, samples_per_epoch=4)


def test_pipes_run_nothing_unless_allowed(tmp_path: Path) -> None:
    for action in ("index", "check", "stats"):
        assert cli.main(["data", action, f"pipe:touch {tmp_path}/ran"]) == 2
    assert not tree(tmp_path)
