"""Real tars of every format, by GNU tar and by Python's tarfile: ours reads each member as tarfile does."""

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from amclip_ds.data.check import CheckConfig, check
from amclip_ds.shards.tar import BLOCK, Damage, Link, Member, scan
from tests.unit.data.damaged import picture, sample, samples, tar_of

GNU_TAR = shutil.which("tar")
GNU_WAYS = {
    "v7": ["--format=v7", "--exclude=*fifo*"],
    "oldgnu": ["--format=oldgnu"],
    "gnu": ["--format=gnu"],
    "ustar": ["--format=ustar"],
    "pax": ["--format=pax"],
    "gnu, sparse": ["--format=gnu", "--sparse"],
    "oldgnu, sparse": ["--format=oldgnu", "--sparse"],
    "pax, sparse 0.0": ["--format=pax", "--sparse", "--sparse-version=0.0"],
    "pax, sparse 0.1": ["--format=pax", "--sparse", "--sparse-version=0.1"],
    "pax, sparse 1.0": ["--format=pax", "--sparse", "--sparse-version=1.0"],
    "pax, a global header": ["--format=pax", "--pax-option=globexthdr.name=g,comment=hello"],
    "pax, a header for all": ["--format=pax", "--pax-option=comment:=each"],
    "incremental": ["--format=gnu", "--listed-incremental=snapshot"],
    "a label": ["--format=gnu", "--label=volume"],
    "large blocks": ["--format=gnu", "--blocking-factor=128"],
}
LONG = "/".join(["a folder with a long name " + "x" * 60] * 4)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short, long, odd and foreign names; folders, links, empty files, files with holes."""
    root = tmp_path_factory.mktemp("tree")
    for folder in ("plain", "v1.0.2", "unicode é 日本", "empty"):
        (root / folder).mkdir()
    for number in range(5):
        (root / "plain" / f"{number:04d}.jpg").write_bytes(picture(number))
        (root / "plain" / f"{number:04d}.txt").write_text(f"number {number}")
    (root / "v1.0.2" / "a.b.c.jpg").write_bytes(b"x" * BLOCK)
    (root / "unicode é 日本" / "ü.txt").write_bytes(b"y" * (BLOCK + 1))
    (root / os.fsdecode(b"plain/\xff\xfe.txt")).write_bytes(b"no UTF-8")
    (root / "plain" / "empty.txt").touch()
    os.link(root / "plain" / "0000.jpg", root / "plain" / "9000.jpg")
    os.symlink("0000.jpg", root / "plain" / "9001.jpg")
    os.mkfifo(root / "plain" / "fifo.jpg")
    with (root / "plain" / "holes.bin").open("wb") as file:
        for piece in range(40):  # more pieces than the first header of a sparse file has places for
            file.seek(piece * (1 << 16))
            file.write(b"%d" % piece * 100)
        file.truncate(41 << 16)
    return root


def with_long_names(tree: Path, root: Path) -> Path:
    shutil.copytree(tree, root / "all", symlinks=True, ignore=shutil.ignore_patterns("fifo*"))
    (root / "all" / LONG).mkdir(parents=True)
    (root / "all" / LONG / ("n" * 200 + ".jpg")).write_bytes(picture(9))
    (root / "all" / LONG / "link.jpg").symlink_to("t" * 200)
    return root / "all"


def ours(path: Path) -> tuple[list[tuple[str, int, int, bool]], list[str], list[Damage]]:
    """(name, offset, size, sparse) of the members, the links, the damage."""
    with path.open("rb") as file:
        found = list(scan(file, path.stat().st_size))
    members = [(m.name, m.offset, m.size, m.is_sparse) for m in found if isinstance(m, Member)]
    return (
        members,
        [item.name for item in found if isinstance(item, Link)],
        [item for item in found if isinstance(item, Damage)],
    )


def assert_as_tarfile_reads(path: Path, ignore_zeros: bool = False) -> int:
    """Every member by name, offset and size (of sparse ones the name alone, which is reported); returns how many."""
    members, links, damage = ours(path)
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape", ignore_zeros=ignore_zeros) as tar:
        theirs = tar.getmembers()
        regular = [info for info in theirs if info.isfile()]
        assert [name for name, *_ in members] == [info.name for info in regular]
        assert [is_sparse for *_, is_sparse in members] == [info.issparse() for info in regular]
        content = path.read_bytes()
        for (_, offset, size, is_sparse), info in zip(members, regular):
            if not is_sparse:
                reader = tar.extractfile(info)
                assert reader is not None
                assert (offset, size) == (info.offset_data, info.size)
                assert content[offset : offset + size] == reader.read()
    assert links == [info.name for info in theirs if info.issym() or info.islnk()]
    assert [item.kind for item in damage] == (["zeros"] * len(damage) if ignore_zeros else [])
    return len(members)


@pytest.mark.skipif(GNU_TAR is None, reason="no tar")
@pytest.mark.parametrize("way", GNU_WAYS)
def test_what_gnu_tar_writes(way: str, tree: Path, tmp_path: Path) -> None:
    root = tree if way in ("v7", "ustar") else with_long_names(tree, tmp_path)
    made = subprocess.run(
        ["tar", "--sort=name", *GNU_WAYS[way], "-cf", "made.tar", "-C", root, "."], cwd=tmp_path, capture_output=True
    )
    assert made.returncode == 0, made.stderr
    assert assert_as_tarfile_reads(tmp_path / "made.tar") >= 14


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_tarfile_writes(tar_format: int, tree: Path, tmp_path: Path) -> None:
    root = tree if tar_format == tarfile.USTAR_FORMAT else with_long_names(tree, tmp_path)
    settings = {"pax_headers": {"comment": "é" * 300}} if tar_format == tarfile.PAX_FORMAT else {}
    with tarfile.open(tmp_path / "made.tar", "w", format=tar_format, errors="surrogateescape", **settings) as tar:
        tar.add(root, ".")
    assert assert_as_tarfile_reads(tmp_path / "made.tar") >= 14


def pax_record(keyword: str, value: str) -> bytes:
    record = f" {keyword}={value}\n".encode()
    length = len(record) + 1
    while len(str(length)) + len(record) != length:
        length = len(str(length)) + len(record)
    return str(length).encode() + record


def extended(kind: bytes, content: bytes, name: str = "././@PaxHeader") -> bytes:
    """An extended header of its own, written byte by byte."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK)


def plain(name: str, content: bytes, said: int | None = None) -> bytes:
    """A member; said: the size that its header claims."""
    info = tarfile.TarInfo(name)
    info.size = len(content) if said is None else said
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % BLOCK)


def base_256(name: str, content: bytes) -> bytes:
    """A member whose size is written as GNU writes that of 8 GiB and more."""
    block = bytearray(plain(name, content)[:BLOCK])
    block[124:136] = b"\x80" + len(content).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + content + bytes(-len(content) % BLOCK)


TEXT = b"z" * 700
BUILT = {
    "size in a pax record": extended(b"x", pax_record("size", "700")) + plain("a.jpg", TEXT, said=0),
    "size in base 256": base_256("a.jpg", TEXT),
    "a name of a global header": extended(b"g", pax_record("path", "all.jpg")) + plain("a", TEXT) + plain("b", TEXT),
    "its own name over the global one": extended(b"g", pax_record("path", "all.jpg"))
    + extended(b"x", pax_record("path", "own.jpg"))
    + plain("a", TEXT)
    + plain("b", TEXT),
    "Solaris' own type": extended(b"X", pax_record("path", "solaris.jpg")) + plain("a", TEXT),
    "a long link between a long name and its member": extended(b"L", b"n" * 200 + b".jpg\0", "././@LongLink")
    + extended(b"K", b"t" * 200 + b"\0", "././@LongLink")
    + plain("a", TEXT),
    "a pax name around a long name": extended(b"x", pax_record("path", "pax.jpg"))
    + extended(b"L", b"long.jpg\0", "././@LongLink")
    + plain("a", TEXT),
    "a long name around a pax name": extended(b"L", b"long.jpg\0", "././@LongLink")
    + extended(b"x", pax_record("path", "pax.jpg"))
    + plain("a", TEXT),
    "two pax headers": extended(b"x", pax_record("path", "one.jpg"))
    + extended(b"x", pax_record("path", "two.jpg"))
    + plain("a", TEXT),
    "attributes of 300 KiB": extended(
        b"x", pax_record("SCHILY.xattr.user.a", "v" * 300_000) + pax_record("path", "big.jpg")
    )
    + plain("a", TEXT),
    "a value with line ends and an equals sign": extended(
        b"x", pax_record("comment", "1 path=x\n9 path=y\n") + pax_record("path", "a=b.jpg")
    )
    + plain("a", TEXT),
    "an unknown type": extended(b"Z", TEXT, "odd.jpg") + plain("a.jpg", TEXT),
    "a contiguous file": extended(b"7", TEXT, "c.jpg") + plain("a.jpg", TEXT),
}


@pytest.mark.parametrize("name", BUILT)
def test_what_other_writers_may_write(name: str, tmp_path: Path) -> None:
    (tmp_path / "made.tar").write_bytes(BUILT[name] + plain("last.txt", b"last") + bytes(2 * BLOCK))
    assert assert_as_tarfile_reads(tmp_path / "made.tar") >= 2


def test_joined_tars_are_read_whole_and_reported(tmp_path: Path) -> None:
    pax = tar_of([("é" * 80 + ".jpg", b"1")], tarfile.PAX_FORMAT)
    (tmp_path / "made.tar").write_bytes(tar_of(samples([0])) + pax + bytes(4 * BLOCK) + tar_of(samples([1])))
    assert assert_as_tarfile_reads(tmp_path / "made.tar", ignore_zeros=True) == 5


@pytest.mark.parametrize("size", ["-5", "٣", "1e3", "9" * 30])
def test_a_pax_size_that_is_none_is_damage(size: str, tmp_path: Path) -> None:
    content = extended(b"x", pax_record("size", size)) + plain("a.jpg", TEXT) + plain("b.jpg", TEXT) + bytes(2 * BLOCK)
    (tmp_path / "made.tar").write_bytes(content)
    members, _, damage = ours(tmp_path / "made.tar")
    assert [item.kind for item in damage] == ["header"] and [name for name, *_ in members] == ["b.jpg"]


def test_a_global_header_cannot_blow_names_up() -> None:
    """A long name that is written once and holds for 100,000 members, and 50,000 keys that each would carry along."""
    many = b"".join(pax_record(f"GNU.sparse.{number}", "x") for number in range(30_000))
    for content in (pax_record("path", "n" * 60_000 + ".jpg"), pax_record("GNU.sparse.name", "n" * 60_000), many):
        members, damage = ours_of(extended(b"g", content) + plain("a.jpg", TEXT) * 2000 + bytes(2 * BLOCK))
        assert len(members) == 2000 and {member.name for member in members} == {"a.jpg"}
        assert [item.kind for item in damage] == ([] if content is many else ["name"])


def test_a_damaged_header_of_a_v7_tar_costs_one_member(tmp_path: Path) -> None:
    """Without the mark of later formats the next header is found by its checksum."""
    content = bytearray(tar_of(samples(range(4))))
    for start in range(0, len(content), BLOCK):
        if content[start + 257 : start + 262] == b"ustar":
            header = tarfile.TarInfo.frombuf(bytes(content[start : start + BLOCK]), "utf-8", "strict")
            block = bytearray(content[start : start + 257]) + bytes(255)
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
            content[start : start + BLOCK] = block
            assert header.name
    assert len(ours_of(bytes(content))[0]) == 8
    content[0:1] = b"X"
    members, damage = ours_of(bytes(content))
    assert len(members) == 7 and [item.kind for item in damage] == ["header"]


def ours_of(content: bytes) -> tuple[list[Member], list[Damage]]:
    found = list(scan(io.BytesIO(content), len(content)))
    return [m for m in found if isinstance(m, Member)], [d for d in found if isinstance(d, Damage)]


@pytest.mark.skipif(GNU_TAR is None, reason="no tar")
def test_sparse_and_linked_images_are_named(tmp_path: Path) -> None:
    """A sample whose image is stored without its holes is skipped and named; a link is named too."""
    for name, content in samples(range(4)):
        (tmp_path / name).write_bytes(content)
    with (tmp_path / "000001.jpg").open("ab") as file:
        file.truncate(1 << 20)  # a hole behind the picture
    (tmp_path / "000003.jpg").unlink()
    (tmp_path / "000003.jpg").symlink_to("000000.jpg")
    names = sorted(name for name, _ in samples(range(4)))
    subprocess.run(["tar", "--sparse", "-cf", "00000.tar", *names], cwd=tmp_path, check=True)
    report = check([str(tmp_path / "00000.tar")], CheckConfig(), 1)
    assert report.problems() == {"sparse": 1, "link": 1, "no image": 1}
    assert (report.total("read"), report.total("skipped"), report.total("images")) == (2, 2, 3)
    subprocess.run(["tar", "--dereference", "--hard-dereference", "-cf", "00000.tar", *names], cwd=tmp_path, check=True)
    assert check([str(tmp_path / "00000.tar")], CheckConfig(), 1).total("read") == 4


def test_a_reader_of_plain_headers_alone_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: without the pax records' words, these tests fail."""
    monkeypatch.setattr("amclip_ds.shards.tar._records", lambda *args: {})
    with pytest.raises(AssertionError):
        test_what_other_writers_may_write("size in a pax record", tmp_path)


def test_causes_can_be_counted() -> None:
    """The same fault has the same words wherever it is: no offset, no name, no address in them."""
    tar = bytearray(tar_of(sample(0) + samples(range(1, 6))))
    for number in (1, 4):
        tar[tar.index(b"%06d.jpg\0" % number) + 100] ^= 0xFF
    causes = [item.cause for item in scan(io.BytesIO(bytes(tar)), len(tar)) if isinstance(item, Damage)]
    assert len(causes) == 2 and len(set(causes)) == 1
