"""`amclip data pack`: images with captions from elsewhere become tars to train on.

    OUT/00000.tar ...   key.jpg and key.txt (a caption a line); the key is the number of the row
    OUT/sizes.json      how many samples each tar holds
    OUT/pack.jsonl      what was packed: a head, then a line a tar with its rows and those left out

Every image is decoded once; what training would trip over is left out and named. A tar appears under its name when it
is whole, and then its line is written, so a pack that was killed resumes from its last whole tar.
"""

import json
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from amclip_ds.data.pack_sources import Row, Source
from amclip_ds.data.plain_text import BadText, decode, lines, parse_object, visible
from amclip_ds.errors import AmclipError, UserError
from amclip_ds.files import describe, not_written, outlasting, read_bytes, write_atomically
from amclip_ds.images import BadImage, kind_of, open_image
from amclip_ds.jsonl import append_line, read_lines
from amclip_ds.shards.grouping import MAX_IMAGE_BYTES, MAX_TEXT_BYTES
from amclip_ds.shards.tar import printable

RECORD = "pack.jsonl"
MAX_RECORD = 1 << 30  # bytes of a record in which many rows are left out
AHEAD = 8  # rows a thread that are read ahead
STALE_S = 1800  # without a byte: the tar of a pack that was killed
SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


class Fault(Exception):
    """Why a row is left out; its words are the same for the same fault."""


@dataclass
class Packed:
    """What a folder holds now."""

    shards: dict[str, int] = field(default_factory=dict)
    """name -> samples"""
    rows: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[int, str]] = field(default_factory=dict)
    """cause -> (number, name) of the first row left out for it"""

    @property
    def samples(self) -> int:
        return sum(self.shards.values())

    @property
    def further(self) -> int:
        """Rows whose caption is in the sample of a row above."""
        return self.rows - self.samples - self.causes.total()

    def add(self, line: dict[str, Any]) -> None:
        """One line of the record."""
        if line["samples"]:
            self.shards[line["shard"]] = line["samples"]
        self.rows += line["rows"]
        for row in line["left_out"]:
            self.causes[row["cause"]] += 1
            self.first.setdefault(row["cause"], (row["row"], row["name"]))

    def lines(self) -> list[str]:
        """For people."""
        reported = [
            f"left out: {count} rows: {cause}; the first is row {self.first[cause][0] + 1},"
            f" {printable(self.first[cause][1])[:200]}"
            for cause, count in self.causes.most_common()
        ]
        return [
            *reported,
            f"{self.rows} rows = {self.samples} samples in {len(self.shards)} tar(s) + {self.causes.total()} left out"
            + (f" + {self.further} further rows of the same images" if self.further else ""),
        ]

    def facts(self) -> dict[str, Any]:
        """For a program."""
        return {
            "rows": self.rows,
            "samples": self.samples,
            "left_out": self.causes.total(),
            "further": self.further,
            "shards": self.shards,
            "causes": dict(self.causes.most_common()),
        }


def pack(source: Source, out: Path, shard_size: int, threads: int, advance: Callable[[int], None]) -> Packed:
    """Packs all rows that are not yet packed. Returns what the folder holds. Raises UserError, AmclipError."""
    head = {"pack": 1, "source": source.fingerprint, "rows": source.count, "shard_size": shard_size}
    done = _open_record(out, head)
    if done.rows:
        advance(done.rows)
    try:
        _remove_partial(out, STALE_S)
        with (
            _Shards(out, done, shard_size) as shards,
            closing(_verified(source.rows(done.rows), threads)) as verified,
        ):
            for row, sample in verified:
                shards.take(row, sample)
                advance(1)
        _remove_partial(out, 0)
        write_atomically(out / "sizes.json", json.dumps(done.shards, indent=0) + "\n")
    except OSError as error:
        raise AmclipError(
            f"--out {out}: cannot be written: {error.strerror or error}; the same command resumes"
        ) from None
    if not done.samples:
        _forget(out)
        raise UserError(f"SOURCE: none of {done.rows} rows can be packed: {'; '.join(done.lines()[:3])}")
    return done


def _remove_partial(out: Path, age_s: float) -> None:
    """Removes tars that a pack which was stopped had begun: those that nobody has written to for so long."""
    for partial in out.glob(".[0-9]*.tar*.partial"):
        with suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime >= age_s:
                partial.unlink()


def _forget(out: Path) -> None:
    """Removes the record of a pack without a sample: the corrected command is to find the folder as this one did."""
    with suppress(OSError):
        for name in (RECORD, "sizes.json"):
            (out / name).unlink(missing_ok=True)
        out.rmdir()  # where there is nothing else in it


def _open_record(out: Path, head: dict[str, Any]) -> Packed:
    """What was packed before. Raises UserError for a folder that holds something else."""
    found = Packed()
    try:
        out.mkdir(parents=True, exist_ok=True)
        rows = read_lines(out / RECORD, {}, MAX_RECORD)
        if not rows:
            if any(not path.name.startswith(".") for path in out.iterdir()):
                raise UserError(f"--out {out}: holds something else; name an empty or new folder")
            append_line(out / RECORD, head)
            rows = [head]
    except OSError as error:
        raise not_written(f"--out {out}:", error) from None
    if rows[0] != head:
        changed = [key for key in head if rows[0].get(key) != head[key]]
        raise UserError(
            f"--out {out}: holds a pack of something else ({', '.join(changed)} differ); name another folder, or give"
            " the same arguments to continue"
        )
    for line, above in zip(rows[1:], rows):
        if line == above:  # of two packs that wrote the same tar at the same moment
            continue
        if line.get("first_row") != found.rows or not (out / str(line.get("shard"))).exists() and line.get("samples"):
            raise UserError(f"{out / RECORD}: does not agree with the tars beside it; name another folder")
        found.add(line)
    return found


class _Shards:
    """The tars being written, and the record of those that are whole."""

    def __init__(self, out: Path, done: Packed, size: int) -> None:
        self.out, self.done, self.size = out, done, size
        self._left_out: list[dict[str, Any]] = []
        self._rows = self._samples = 0
        self._record_bytes = (out / RECORD).stat().st_size
        self._is_left_out = False
        self._writer: Any = None
        self._file: BinaryIO | None = None

    def take(self, row: Row, sample: dict[str, Any] | Fault) -> None:
        """One row: into the tar, or onto the list of those left out; a further one of an image is counted."""
        number = self.done.rows + self._rows
        self._rows += 1
        if row.is_further:
            if self._is_left_out:
                self._left_out.append(self._left_out[-1] | {"row": number})
            return
        self._is_left_out = isinstance(sample, Fault)
        if isinstance(sample, Fault):
            self._left_out.append({"row": number, "name": row.name, "cause": str(sample)})
            return
        if self._writer is None:
            from webdataset import ShardWriter

            self._writer = ShardWriter(
                f".%05d.tar.{socket.gethostname().replace('%', '')}-{os.getpid()}.partial",
                self.size + 1,
                start_shard=len(self.done.shards),
                opener=self._open,
                post=self._finish,
                verbose=0,
                encoder=False,
                mtime=0,
                user="",
                group="",
                mode=0o644,
            )
        self._writer.write({"__key__": f"{number:09d}", **sample})
        self._samples += 1
        if self._samples == self.size:
            self._writer.finish()

    def _open(self, name: str) -> BinaryIO:
        self._file = (self.out / name).open("wb")
        return self._file

    def _finish(self, name: str) -> None:
        """The tar is whole: on the disk, under its name, in the record."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._check_alone(self.out / name)
        final = f"{name.removeprefix('.').partition('.')[0]}.tar"
        (self.out / name).rename(self.out / final)
        self._note(final)

    def _check_alone(self, partial: Path) -> None:
        """Raises UserError where another pack writes into this folder: both would write the same tars, and each row of
        the record twice."""
        if not partial.exists() or (self.out / RECORD).stat().st_size != self._record_bytes:
            partial.unlink(missing_ok=True)
            raise UserError(f"--out {self.out}: another `amclip data pack` writes there; let it end, and this one")

    def _note(self, shard: str) -> None:
        line = {
            "shard": shard,
            "first_row": self.done.rows,
            "rows": self._rows,
            "samples": self._samples,
            "left_out": self._left_out,
        }
        append_line(self.out / RECORD, line)
        self._record_bytes = (self.out / RECORD).stat().st_size
        self.done.add(line)
        self._left_out, self._rows, self._samples = [], 0, 0

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:  # the tar that was begun is made again
            return
        if self._samples:
            self._writer.finish()
        elif self._rows:
            self._note("")


def _verified(rows: Iterator[Row], threads: int) -> Generator[tuple[Row, dict[str, Any] | Fault], None, None]:
    """Each row with its sample, or what is wrong with it; images are decoded in threads, in order."""
    waiting: deque[tuple[Row, Future[dict[str, Any] | Fault]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for row in rows:
                waiting.append((row, pool.submit(_sample_of, row)))
                if len(waiting) >= threads * AHEAD:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _sample_of(row: Row) -> dict[str, Any] | Fault:
    """The members of a sample, by suffix."""
    try:
        if row.is_further:
            return {}
        if row.fault:
            raise Fault(row.fault)
        content = _content(row.image)
        open_image(content).decode()  # as `amclip data check` does
        captions = [" ".join(lines(text)) for text in visible(_texts(row))]
        if not captions:
            raise Fault("empty caption" if row.captions or row.caption_file else "no caption")
        text = "\n".join(captions).encode()
        if len(text) > MAX_TEXT_BYTES:
            raise Fault(f"too large captions: more than {MAX_TEXT_BYTES} bytes")
        return {SUFFIXES[kind_of(content)]: content, "txt": text}
    except Fault as fault:
        return fault
    except BadImage as error:
        return Fault(f"{error.kind} image: {error}")
    except BadText as error:
        return Fault(error.kind)
    except UnicodeEncodeError:
        return Fault("not utf-8")


def _content(image: Path | bytes) -> bytes:
    if isinstance(image, Path):
        file = image
        try:
            image = outlasting(f"SOURCE: {file}", lambda: read_bytes(file, MAX_IMAGE_BYTES))
        except (OSError, ValueError) as error:
            cause = describe(error) if isinstance(error, OSError) else "no name of a file"
            raise Fault("missing file" if cause == "missing" else f"a file that cannot be read: {cause}") from None
    if len(image) > MAX_IMAGE_BYTES:
        raise Fault(f"too large image: more than {MAX_IMAGE_BYTES} bytes")
    return image


def _texts(row: Row) -> list[str]:
    file = row.caption_file
    if file is None:
        return list(row.captions)
    try:
        content = outlasting(f"SOURCE: {file}", lambda: read_bytes(file, MAX_TEXT_BYTES))
    except OSError as error:
        raise Fault(f"a caption that cannot be read: {describe(error)}") from None
    if file.suffix.lower() == ".txt":
        return lines(decode(content))
    fields = parse_object(content)
    found = fields.get("captions", fields.get("caption", []))
    return [text for text in (found if isinstance(found, list) else [found]) if isinstance(text, str)]
