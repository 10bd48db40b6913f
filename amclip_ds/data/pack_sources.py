"""What `amclip data pack` reads, row by row in a fixed order: folders, tables, files of Parquet and Arrow.

    ROOT/cat.jpg  ROOT/cat.txt                     images, each beside its caption
    ROOT/cat.jpg  ROOT/metadata.csv                images, and a table of their names and captions
    pairs.csv  pairs.tsv  pairs.jsonl              a table alone; names are relative to its folder, or to --root
    data/train-00000-of-00002.parquet ...          a data set of the hub, images inside
    dataset_info.json  data-00000-of-00001.arrow   one that `datasets` saved to disk, images inside

Rows of a table that follow each other and name one image are one sample with several captions, as Flickr30K's and
COCO's tables have them. A source that could be understood in two ways, or in none, is a UserError that says what to
add; so is an option that the source does not read. Loads no torch.
"""

import csv
import itertools
import json
import os
import re
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from amclip_ds.errors import UserError, in_one_line
from amclip_ds.files import is_regular, not_read, read_json, walk
from amclip_ds.shards.kinds import IMAGES, PACK, TABLES, kind_by_name
from amclip_ds.shards.tar import printable

IMAGE_KEYS = ("filepath", "file_name", "filename", "image_path", "image", "img", "jpg", "png", "webp", "path")
CAPTION_KEYS = ("title", "caption", "captions", "text", "txt", "sentence", "description")
METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "captions.csv", "captions.tsv", "captions.jsonl")
SPLIT_OF = re.compile(r"(.+?)-\d+-of-\d+(-[0-9a-f]+)?\.(?:parquet|arrow)")
SPLIT_IN = re.compile(
    r"(?<![a-z])(?:train(?:ing)?|test(?:ing)?|val(?:id(?:ation)?)?|dev|eval(?:uation)?)(?![a-z])", re.IGNORECASE
)
"""a split's name in that of a file or of a folder above it, as the hub finds it"""
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
MAX_FIELD = 1 << 20  # characters of a cell
OF_URLS = ("url", "image_url", "img_url")  # columns of LAION's, DataComp's and CC12M's tables
DOWNLOAD = "img2dataset downloads them into shards (--output_format=webdataset)"
READ = "a folder, a table (csv, tsv, jsonl: an object a line) or a file of Parquet or Arrow is packed"
ROWS_AT_ONCE = 64  # of a Parquet or Arrow file, with their images
BESIDE = 32 << 20  # bytes of a metadata table's first lines


@dataclass(frozen=True)
class Row:
    """One image with its captions, or what is wrong with the row."""

    name: str
    """what its user knows it by"""
    image: Path | bytes = b""
    captions: tuple[str, ...] = ()
    caption_file: Path | None = None
    """where the captions are still to be read from"""
    fault: str = ""
    is_further: bool = False
    """another caption of the image above, which has it already"""


class Source(Protocol):
    """Rows in an order that does not change."""

    count: int
    """of all rows"""
    fingerprint: str
    """of what is read and how, so that a pack that continues reads the same rows"""

    def describe(self) -> str:
        """What was understood, in a line."""
        ...

    def rows(self, start: int) -> Iterator[Row]:
        """From row number `start` on."""
        ...


@dataclass(frozen=True)
class Keys:
    """What the user said about the columns."""

    image: str | None = None
    caption: str | None = None
    root: Path | None = None
    """to which names of images are relative"""
    split: str = ""

    def check_read(self, source: str, *read: str) -> None:
        """Refuses what was given and the source does not read: it would go unheard. Raises UserError."""
        for name in ("image", "caption", "root", "split"):
            if getattr(self, name) and name not in read:
                option = f"--{name}-key" if name in ("image", "caption") else f"--{name}"
                raise UserError(f"{option} {getattr(self, name)}: nothing to read by it in {source}")


def open_source(spec: str, keys: Keys) -> Source:
    """Raises UserError for what is missing, unknown or unclear."""
    path = Path(spec).expanduser()
    if URL.match(spec):
        raise UserError(
            f"SOURCE: {spec} is a URL; download it: for a data set of the hub, hf download NAME"
            " --repo-type dataset --local-dir DIR"
        )
    if path.is_dir():
        return _open_folder(path, keys)
    if not is_regular(path):
        raise UserError(f"SOURCE: no such file or folder: {spec}")
    if path.suffix.lower() in TABLES:
        return Table(path, keys)
    if path.suffix.lower() in (".parquet", ".arrow"):
        return Arrow([path], keys, spec)
    what = kind_by_name(spec).removesuffix(f"; {PACK}")
    is_tar = path.suffix.lower() == ".tar"
    raise UserError(
        f"SOURCE: {printable(spec)} is a shard already: amclip data check reads it"
        if is_tar
        else f"SOURCE: {printable(spec)}{f' is {what}' if what else ''}: {READ}"
    )


def _open_folder(folder: Path, keys: Keys) -> Source:
    if is_regular(folder / "dataset_dict.json"):
        splits = [name for name in read_json(folder / "dataset_dict.json", dict).get("splits", []) if str(name)]
        chosen = _one_split(folder, [str(name) for name in splits], keys)
        return _open_folder(folder / chosen, replace(keys, split=""))
    if is_regular(folder / "state.json"):
        named = read_json(folder / "state.json", dict).get("_data_files", [])
        files = [folder / Path(str(item.get("filename"))).name for item in named if isinstance(item, dict)]
        return Arrow(files, keys, str(folder))
    with _reading(folder):
        found = [Path(at, name) for at, _, names in walk(folder) for name in names]
    files = sorted(path for path in found if path.suffix.lower() in (".parquet", ".arrow"))
    if files:
        return Arrow(_of_split(folder, files, keys), replace(keys, split=""), str(folder))
    if keys.split:
        below = f"; name {folder / keys.split}" if (folder / keys.split).is_dir() else ""
        raise UserError(f"--split {keys.split}: {folder} has no files of Parquet or Arrow{below}")
    tables = [folder / name for name in METADATA if is_regular(folder / name)]
    if len(tables) > 1:
        raise UserError(f"SOURCE: {folder}: {tables[0].name} and {tables[1].name} may each hold the captions: name one")
    return Table(tables[0], keys) if tables else Folder(folder, keys)


def _of_split(folder: Path, files: Sequence[Path], keys: Keys) -> list[Path]:
    """The files of the one split, or of the one asked for. Raises UserError where they are not of one data set."""
    splits = {path: _split_of(path.relative_to(folder)) for path in files}
    names = sorted(set(splits.values()) - {""})
    if not names:
        keys.check_read(f"{folder}: its files are of no split", "image", "caption")
        return list(files)
    chosen = _one_split(folder, names, keys)
    if without := [path for path in files if not splits[path]]:
        raise UserError(f"SOURCE: {folder}: {without[0]} is of no split, beside {', '.join(names)}: name what to pack")
    found = [path for path in files if splits[path] == chosen]
    seen: dict[str, Path] = {}
    for path in found:
        other = seen.setdefault(path.name, path)
        if other != path:
            raise UserError(f"SOURCE: {other} and {path} are of two data sets: name the folder of one")
    return found


def _split_of(path: Path) -> str:
    """The split of a file by its name, or by the folders above it; empty where nothing says it."""
    if match := SPLIT_OF.fullmatch(path.name):
        return match[1]
    named = SPLIT_IN.search(str(path.with_suffix("")))
    return named[0].lower() if named else ""


def _one_split(folder: Path, splits: Sequence[str], keys: Keys) -> str:
    if keys.split:
        if keys.split not in splits:
            raise UserError(f"--split {keys.split}: {folder} has {', '.join(splits)}")
        return keys.split
    if len(splits) != 1:
        raise UserError(f"SOURCE: {folder} has the splits {', '.join(splits)}: choose with --split")
    return splits[0]


class Folder:
    """Images, each beside a .txt with its captions, a line each, or a .json with `caption` or `captions`."""

    def __init__(self, folder: Path, keys: Keys) -> None:
        """Raises UserError where no image has a caption."""
        keys.check_read(f"a folder of images beside their captions ({folder})")
        self.folder = folder
        found: dict[str, dict[str, list[str]]] = {}
        with _reading(folder):
            for at, _, names in walk(folder):
                for name in names:
                    stem, _, kind = name.rpartition(".")
                    if kind.lower() in (*IMAGES, "txt", "json"):
                        key = os.path.join(os.path.relpath(at, folder), stem).removeprefix("./")
                        found.setdefault(key, {}).setdefault(kind.lower(), []).append(os.path.join(at, name))
        self._found = {key: kinds for key, kinds in sorted(found.items()) if kinds.keys() & set(IMAGES)}
        alone = [key for key, kinds in found.items() if key not in self._found and "txt" in kinds]
        self._found |= {key: {"txt": found[key]["txt"]} for key in sorted(alone) if self._found}
        self.count = len(self._found)
        captions = sum(bool(kinds.keys() & {"txt", "json"}) for kinds in self._found.values())
        if not captions:
            what = f"{self.count} images and no caption" if self.count else "neither images nor tables"
            tables = [table for name in METADATA for table in sorted(folder.glob(f"*/{name}"))]
            if tables:
                raise UserError(f"SOURCE: {folder} holds {what}, and {tables[0]}: name the folder of one table")
            raise UserError(
                f"SOURCE: {folder} holds {what}: put NAME.txt with the caption beside each NAME.jpg, or"
                " metadata.csv with the columns file_name and text"
            )
        files = {
            os.path.relpath(path, folder): _size_and_time(path)
            for kinds in self._found.values()
            for paths in kinds.values()
            for path in paths
        }
        self.fingerprint = f"{self.count} files, {_checksum(files):08x}"

    def describe(self) -> str:
        return f"{self.folder}: {self.count} images, each beside its caption"

    def rows(self, start: int) -> Iterator[Row]:
        for key, kinds in itertools.islice(self._found.items(), start, None):
            images = [path for kind in IMAGES for path in kinds.get(kind, [])]
            texts = kinds.get("txt") or kinds.get("json") or []
            if len(images) > 1:
                yield Row(key, fault="several images of one name")
            elif not images:
                yield Row(key, fault="no image beside the caption")
            elif len(texts) != 1:
                fault = "several captions of one name" if texts else "no caption"
                yield Row(os.path.relpath(images[0], self.folder), fault=fault)
            else:
                yield Row(os.path.relpath(images[0], self.folder), Path(images[0]), caption_file=Path(texts[0]))


class Table:
    """A csv, tsv or jsonl of the names of images and their captions."""

    def __init__(self, path: Path, keys: Keys) -> None:
        """Raises UserError where the columns are not clear, or the images are URLs."""
        keys.check_read(f"a table ({path})", "image", "caption", "root")
        self.path, self.root = path, keys.root or path.parent
        self._is_json = path.suffix.lower() in (".jsonl", ".ndjson")
        csv.field_size_limit(MAX_FIELD)
        self.separator, columns = ("", self._json_columns()) if self._is_json else self._csv_columns(keys)
        self.image = _column(str(path), columns, keys.image, IMAGE_KEYS, "--image-key")
        self.caption = _column(str(path), columns, keys.caption, CAPTION_KEYS, "--caption-key")
        self._columns = columns
        self.count = sum(1 for _ in self._cells())
        first = next((cells for cells in self._cells() if isinstance(cells, dict)), {})
        if URL.match(str(first.get(self.image, ""))):
            raise UserError(f"SOURCE: {path}: its images are URLs; {DOWNLOAD}")
        self.fingerprint = f"{_checksum_of(path):08x}, {self.image}, {self.caption}, {self.root.resolve()}"

    def describe(self) -> str:
        return f"{self.path}: {self.count} rows, images {self.image!r}, captions {self.caption!r}, below {self.root}"

    def rows(self, start: int) -> Iterator[Row]:
        return itertools.islice(self._by_image(), start, None)

    def _by_image(self) -> Iterator[Row]:
        """A row for each of the table; the first of several of one image has all their captions."""
        rows = (self._row(number, cells) for number, cells in enumerate(self._cells(), 1))
        for _, of_one in itertools.groupby(rows, lambda row: (row.name, row.fault)):
            first, *further = of_one
            captions = [text for row in (first, *further) for text in row.captions]
            yield replace(first, captions=tuple(captions))
            yield from (replace(row, is_further=True) for row in further)

    def _row(self, number: int, cells: dict[str, Any] | str) -> Row:
        if isinstance(cells, str):
            return Row(f"row {number}", fault=cells)
        name = cells.get(self.image)
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            return Row(f"row {number}", fault="no name of an image")
        return Row(name, self.root / name, _captions(cells.get(self.caption)))

    def _cells(self) -> Iterator[dict[str, Any] | str]:
        """The cells of each row by column, or what is wrong with it. Raises UserError."""
        with _reading(self.path), self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            if self._is_json:
                for line in file:
                    if line.strip():
                        yield _parsed(line)
                return
            for cells in itertools.islice(self._split(_Lines(file)), 1, None):
                if isinstance(cells, str):
                    yield cells
                elif cells:
                    is_whole = len(cells) == len(self._columns)
                    fault = "another number of columns than the first line"
                    yield dict(zip(self._columns, cells)) if is_whole else fault

    def _split(self, lines: "_Lines") -> Iterator[list[str] | str]:
        """The cells of each row, or what is wrong with it.

        A quote that is not closed would take the rows after it into its cell. So a row of several lines whose quotes
        are not csv's, or that has another row in it, is its first line alone.
        """
        reader = csv.reader(lines, delimiter=self.separator, strict=True)
        while True:
            lines.of_row.clear()
            try:
                cells: list[str] | str = next(reader)
                is_one = not any(self._is_row(line) for line in lines.of_row[1:])
            except StopIteration:
                return
            except csv.Error:
                is_one = False
            if not is_one:
                first, *later = lines.of_row
                lines.give_back(later)
                cells = self._split_line(first)
            yield cells

    def _split_line(self, line: str) -> list[str] | str:
        """One line's cells. Where tabs separate them, a quote that does not enclose a cell is the caption's."""
        whole = [line.rstrip("\r\n")]
        try:
            if self.separator == "\t":
                return next(csv.reader(whole, delimiter="\t", quoting=csv.QUOTE_NONE), [])
            return next(csv.reader(whole, delimiter=self.separator), [])
        except csv.Error as error:
            return f"not csv: {in_one_line(error, 80)}"

    def _is_row(self, line: str) -> bool:
        """Whether a line that is in a quoted cell is a row by itself: as many cells, and the image's names one."""
        cells = self._split_line(line)
        if isinstance(cells, str) or len(cells) != len(self._columns):
            return False
        return cells[self._columns.index(self.image)].rpartition(".")[2].lower() in IMAGES

    def _csv_columns(self, keys: Keys) -> tuple[str, list[str]]:
        """(the separator, the columns): the one of comma and tab by which the first line has the columns."""
        try:
            with _reading(self.path), self.path.open(encoding="utf-8-sig", newline="") as file:
                head = file.readline(MAX_FIELD)
        except UnicodeDecodeError:
            raise UserError(f"SOURCE: {self.path}: not UTF-8 text") from None
        wanted = (
            ({keys.image} if keys.image else set(IMAGE_KEYS)),
            ({keys.caption} if keys.caption else set(CAPTION_KEYS)),
        )
        parsed = {separator: next(csv.reader([head], delimiter=separator), []) for separator in (",", "\t")}
        fitting = [mark for mark, columns in parsed.items() if all(any_of & set(columns) for any_of in wanted)]
        likely = "\t" if head.count("\t") > head.count(",") else ","
        separator = fitting[0] if len(fitting) == 1 else likely
        return separator, parsed[separator]

    def _json_columns(self) -> list[str]:
        with _reading(self.path), self.path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            line = next((line for line in file if line.strip()), "")
        first = _parsed(line)
        return [] if isinstance(first, str) else list(first)


class Arrow:
    """Parquet or Arrow files with the images' bytes in a column, as Hugging Face data sets have them."""

    def __init__(self, files: Sequence[Path], keys: Keys, shown: str) -> None:
        """Raises UserError where the columns are not clear, or hold no bytes."""
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise UserError(f"SOURCE: {shown}: Parquet and Arrow need pyarrow: pip install 'amclip_ds[data]'") from None
        keys.check_read(f"files of one split ({shown})", "image", "caption")
        self._pa, self._pq, self.shown, self.files = pa, pq, shown, list(files)
        if not self.files:
            raise UserError(f"SOURCE: {shown}: names no file of data")
        heads = []
        for file in self.files:
            with _reading(file, pa.ArrowException):
                heads.append(self._head(file))
        schema, counts = heads[0][0], [count for _, count in heads]
        self.image = _column(shown, schema.names, keys.image, IMAGE_KEYS, "--image-key")
        self.caption = _column(shown, schema.names, keys.caption, CAPTION_KEYS, "--caption-key")
        for file, (other, _) in zip(self.files, heads):
            if lacking := {self.image, self.caption} - set(other.names):
                raise UserError(f"SOURCE: {file}: no column {min(lacking)!r}, as {self.files[0].name} has: name one")
        kind = schema.field(self.image).type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)):
            hint = (
                "its images are URLs or names; img2dataset downloads URLs" if pa.types.is_string(kind) else "no image"
            )
            raise UserError(f"SOURCE: {shown}: the column {self.image!r} is {kind}, not bytes of images: {hint}")
        self._counts, self.count = counts, sum(counts)
        sizes = [[file.name, file.stat().st_size] for file in self.files]
        self.fingerprint = f"{len(sizes)} files, {_checksum(sizes):08x}, {self.image}, {self.caption}"

    def describe(self) -> str:
        columns = f"images {self.image!r}, captions {self.caption!r}"
        return f"{self.shown}: {self.count} rows in {len(self.files)} files, {columns}"

    def rows(self, start: int) -> Iterator[Row]:
        number = 0
        for file, count in zip(self.files, self._counts):
            if number + count <= start:
                number += count
                continue
            with _reading(file, self._pa.ArrowException):
                for batch in self._batches(file):
                    if number + batch.num_rows <= start:
                        number += batch.num_rows
                        continue
                    for place in range(max(0, start - number), batch.num_rows):
                        yield self._row(file, batch, place, number + place)
                    number += batch.num_rows

    def _head(self, file: Path) -> tuple[Any, int]:
        if file.suffix.lower() == ".parquet":
            opened = self._pq.ParquetFile(file)
            return opened.schema_arrow, opened.metadata.num_rows
        with self._pa.memory_map(str(file)) as mapped:
            reader = self._reader(mapped)
            return reader.schema, sum(batch.num_rows for batch in self._all(reader))

    def _batches(self, file: Path) -> Iterator[Any]:
        if file.suffix.lower() == ".parquet":
            yield from self._pq.ParquetFile(file).iter_batches(ROWS_AT_ONCE, columns=[self.image, self.caption])
            return
        with self._pa.memory_map(str(file)) as mapped:
            yield from self._all(self._reader(mapped))

    def _reader(self, mapped: Any) -> Any:
        """`datasets` writes streams; others write files with a footer."""
        if mapped.read(6) == b"ARROW1":
            return self._pa.ipc.open_file(mapped)
        mapped.seek(0)
        return self._pa.ipc.open_stream(mapped)

    def _all(self, reader: Any) -> Iterator[Any]:
        if hasattr(reader, "num_record_batches"):
            yield from (reader.get_batch(place) for place in range(reader.num_record_batches))
        else:
            yield from reader

    def _row(self, file: Path, batch: Any, place: int, number: int) -> Row:
        name = f"{file.name}, row {number + 1}"
        try:
            value, caption = (
                batch.column(batch.schema.get_field_index(key))[place].as_py() for key in (self.image, self.caption)
            )
        except (ValueError, UnicodeDecodeError, self._pa.ArrowException) as error:
            return Row(name, fault=f"cannot be read: {type(error).__name__}")
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            outside = isinstance(value, dict) and value.get("path")
            return Row(name, fault="its image is a path, not bytes" if outside else "no image")
        return Row(name, content, _captions(caption))


class _Lines:
    """The lines of a file as csv.reader takes them, of which some may be given back."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines, self._again = lines, deque[str]()
        self.of_row: list[str] = []
        """those taken since it was emptied"""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines).replace("\0", "\ufffd")
        self.of_row.append(line)
        return line

    def give_back(self, lines: list[str]) -> None:
        self._again.extendleft(reversed(lines))


@contextmanager
def _reading(file: Path, *more: type[Exception]) -> Iterator[None]:
    """What is wrong with a file of the source is the source's. more: what else than OSError its reader raises. Raises
    UserError, NotRead."""
    raised: tuple[type[Exception], ...] = (OSError, *more)
    try:
        yield
    except raised as error:
        if isinstance(error, OSError) and error.errno:
            raise not_read(f"SOURCE: {file}", error) from None
        raise UserError(f"SOURCE: {file}: cannot be read: {in_one_line(error, 200)}") from None


def _column(shown: str, columns: Sequence[str], asked: str | None, usual: Sequence[str], option: str) -> str:
    if asked is not None:
        if asked not in columns:
            raise UserError(f"{option} {asked}: {shown} has the columns {', '.join(map(repr, columns[:12]))}")
        return asked
    if not columns:
        raise UserError(f"SOURCE: {shown}: no columns: it is empty, or its first line is not JSON")
    found = [name for name in columns if name.lower() in usual]
    of_urls = [name for name in columns if name.lower() in OF_URLS or URL.match(name)]  # or a row, without a heading
    if not found and of_urls and option == "--image-key":
        raise UserError(f"SOURCE: {shown}: no column of images, and {of_urls[0][:80]!r} holds URLs; {DOWNLOAD}")
    if len(found) != 1:
        what = f"{' and '.join(map(repr, found[:3]))} may each be meant" if found else "none is known"
        listed = ", ".join(map(repr, columns[:12]))
        raise UserError(f"SOURCE: {shown}: name the column with {option}: of {listed}, {what}")
    return found[0]


def _captions(value: Any) -> tuple[str, ...]:
    """A text, or a list of texts; a list written as a text stays one."""
    return tuple(text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str))


def _parsed(line: str) -> dict[str, Any] | str:
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return "not json"
    return parsed if isinstance(parsed, dict) else "json that is no object"


def _checksum_of(table: Path) -> int:
    found = 0
    with _reading(table), table.open("rb") as file:
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    return found


def _size_and_time(path: str) -> tuple[int, int]:
    """(bytes, ns) of a file; zeros for one that is gone, which is left out when it is read."""
    with suppress(OSError):
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    return 0, 0


def _checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode(errors="surrogateescape"))
