"""SHARDS as a person writes them -> the shards, each accepted or refused in its last form. Loads no torch.

    SHARDS = SOURCE::SOURCE...    SOURCE = folder | glob | braces | list.txt | @list | URL | pipe:COMMAND

Every command takes its shards from `expand_shards` or `expand_sources`. What they return is a local path without a
scheme, a URL of one of the SCHEMES or, where the user allowed it, `pipe:COMMAND`; `accept` alone decides, and it sees
each string after braces, globs and lists are expanded. A list is a file: it names paths and URLs, never a command.
"""

import contextlib
import glob
import importlib.util
import os
import re
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from urllib.parse import unquote, urlsplit

import braceexpand

from amclip_ds.errors import UserError
from amclip_ds.files import NOTHING_THERE, mode_at, not_read, outlasting, read_bytes
from amclip_ds.redact import HIDDEN
from amclip_ds.shards import inputs

SCHEMES = {  # scheme -> what reads it: module, package
    "http": ("aiohttp", "aiohttp"),
    "https": ("aiohttp", "aiohttp"),
    "s3": ("s3fs", "s3fs"),
    "s3a": ("s3fs", "s3fs"),
    "gs": ("gcsfs", "gcsfs"),
    "gcs": ("gcsfs", "gcsfs"),
    "az": ("adlfs", "adlfs"),
    "abfs": ("adlfs", "adlfs"),
    "abfss": ("adlfs", "adlfs"),
}
CHAINS = ("simplecache", "filecache", "blockcache", "cached", "zip", "tar", "memory")  # fsspec's first links of a chain
LISTS = (".txt", ".list", ".lst")
MAX_SHARDS = 1 << 20
MAX_LIST_BYTES = 256 << 20
_RANGE = re.compile(r"\{(-?[0-9]{1,18})\.\.(-?[0-9]{1,18})(?:\.\.(-?[0-9]{1,18}))?\}")
_SCHEME = re.compile(r"(?:([a-z][a-z0-9+.-]*)://|(pipe):)", re.IGNORECASE)


def scheme_of(shard: str) -> str:
    """`http`, `s3`, `pipe` and so on, in lower case; empty for a local path."""
    match = _SCHEME.match(shard)
    return (match.group(1) or match.group(2)).lower() if match else ""


def is_remote(shard: str) -> bool:
    """True for a URL (http, https, s3, gs, ...) and for `pipe:`."""
    return bool(scheme_of(shard))


def split_sources(spec: str) -> list[str]:
    """The parts that `::` joins."""
    return [spec] if stat.S_ISREG(mode_at(spec)) else [part for part in spec.split("::") if part]


def expand_sources(
    spec: str, key: str = "data.train", allow_pipe: bool = False, captioned: bool = True
) -> list[list[str]]:
    """Every shard, by the source that `::` joins it to. Raises UserError, naming the key and the first shard that is
    missing, of an unknown scheme, no tar, or, where they are to be `captioned`, a tar of labels alone.
    """
    found = [_expand(part, key, allow_pipe) for part in split_sources(spec)]
    if sum(map(len, found)) > MAX_SHARDS:
        raise UserError(f"{key}: more than {MAX_SHARDS} shards; pack them larger")
    inputs.check_contents([shard for shards in found for shard in shards if not is_remote(shard)], key, captioned)
    return found


def expand_shards(spec: str, key: str = "data.train", allow_pipe: bool = False) -> list[str]:
    """Every shard of all sources, in order. Raises UserError."""
    return [shard for shards in expand_sources(spec, key, allow_pipe) for shard in shards]


def expand_local(spec: str, key: str) -> list[str]:
    """Every shard, all of them files of this machine. Raises UserError."""
    shards = [shard for shards in expand_sources(spec, key, captioned=False) for shard in shards]
    for shard in filter(is_remote, shards):
        raise UserError(f"{key}: {shard!r} is a URL; it is read from local files: download it")
    return shards


def accept(shard: str, key: str, allow_pipe: bool = False) -> str:
    """THE decision about one shard in its last form. Returns how it is read. Raises UserError."""
    scheme = scheme_of(shard)
    if scheme == "pipe":
        if not allow_pipe:
            raise UserError(f"{key}: {shard!r} runs a shell command; {_how_to_allow(key)}")
        return f"pipe:{shard[len('pipe:') :]}"
    if scheme == "file":
        return _accept_local(_path_of(shard, key), key)
    if not scheme:
        return _accept_local(os.path.expanduser(shard), key)
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in ("file", *SCHEMES))
        raise UserError(f"{key}: {shard!r}: {scheme}:// is not read; known are {known} and local paths")
    if "::" in shard:
        raise UserError(f"{key}: {shard!r} is a chain of URLs, which is not read; give the tar's own URL")
    if HIDDEN in shard:
        raise UserError(f"{key}: {shard!r} is from a record, which leaves secrets out; give the whole URL again")
    module, package = SCHEMES[scheme]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{key}: {shard!r} needs {package} (pip install {package})")
    path = urlsplit(shard).path
    if path.lower().endswith(LISTS):
        raise UserError(f"{key}: {shard!r}: a list of shards is read from a local file; download it")
    inputs.check_name(path, shard, key)
    return scheme + shard[len(scheme) :]


def _accept_local(path: str, key: str) -> str:
    try:
        mode = outlasting(f"{key}: {path}", lambda: os.stat(path)).st_mode
    except OSError as error:
        if error.errno not in NOTHING_THERE:
            raise not_read(f"{key}: {path}", error) from None
        raise UserError(f"{key}: no such shard: {path}") from None
    except ValueError:  # a name with a NUL byte
        raise UserError(f"{key}: no such shard: {path}") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{key}: {path} is a folder; give it alone, or the tars in it: '{path}/*.tar'")
    if not stat.S_ISREG(mode):
        raise UserError(f"{key}: {path} is not an ordinary file")
    inputs.check_name(path, path, key)
    return f"./{path}" if is_remote(path) else path  # a file may be called `pipe:rm x.tar`


def _path_of(url: str, key: str) -> str:
    """The local path of a `file://` URL."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"{key}: {url!r} names the machine {parts.netloc!r}; a local file is file:///path, or its path")
    return unquote(url[len("file://") + len(parts.netloc) :])


def _how_to_allow(key: str) -> str:
    if key.startswith("data.train") and ", line" not in key:
        return "training reads by offset, which a pipe has not: write it to a file, or give the URL itself"
    return "--allow-pipe allows it" if key == "SHARDS" else "write its output to a file, and name that"


def _expand(source: str, key: str, allow_pipe: bool) -> list[str]:
    """Every shard of one source, in order."""
    if source in CHAINS:
        raise UserError(f"{key}: '{source}::' begins a chain of URLs, which is not read; give the tar's own URL")
    if stat.S_ISREG(mode_at(source, f"{key}: {source}")):  # a file may be called like a glob
        return _expand_text(source, key, allow_pipe)
    for first, last, step in _RANGE.findall(source):  # braceexpand writes a range out before anything can count it
        if abs(int(last) - int(first)) // max(1, abs(int(step or 1))) > MAX_SHARDS:
            raise UserError(f"{key}: {source!r}: more than {MAX_SHARDS} shards; pack them larger")
    try:
        written = list(islice(braceexpand.braceexpand(source), MAX_SHARDS + 1))
    except ValueError as error:
        raise UserError(f"{key}: {source!r}: {error}") from None
    shards = [shard for text in written for shard in _expand_text(text, key, allow_pipe)]
    if not shards:
        raise UserError(f"{key}: {source!r} names no shard")
    return shards


def _expand_text(text: str, key: str, allow_pipe: bool) -> list[str]:
    """The shards of a folder, a list or a glob; else the one shard."""
    if is_remote(text):
        return [_accept_local(text, key) if stat.S_ISREG(mode_at(text)) else accept(text, key, allow_pipe)]
    path = Path(text).expanduser()
    mode = mode_at(path, f"{key}: {path}")
    if text.startswith("@") and not mode:
        return list(_read_list(Path(text[1:]).expanduser(), key))
    if stat.S_ISDIR(mode):
        return [_accept_local(found, key) for found in inputs.tars_of(path, key)]
    if path.suffix.lower() in LISTS and mode:
        return list(_read_list(path, key))
    if glob.has_magic(str(path)) and not mode:
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            _check_readable(path, key)
            raise UserError(f"{key}: {text!r} matches no file")
        return [_accept_local(match, key) for match in found]
    return [accept(text, key, allow_pipe)]


def _check_readable(pattern: Path, key: str) -> None:
    """Raises AmclipError where the folder that a pattern begins with cannot be read: to glob it is an empty one."""
    folder = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
    with contextlib.suppress(OSError):  # it is missing, or closed to us
        outlasting(f"{key}: {folder}", lambda: os.listdir(folder))


def _read_list(file: Path, key: str) -> Iterator[str]:
    """The shards of a list: one a line, as it is written; a relative path is relative to the list."""
    named = f"{key}: the list {file}"
    try:
        lines = outlasting(named, lambda: read_bytes(file, MAX_LIST_BYTES)).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise not_read(named, error) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{named} is not UTF-8 text (byte {error.start})") from None
    rows = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    rows = [(number, line) for number, line in rows if line and not line.startswith("#")]
    if not rows:
        raise UserError(f"{named} names no shard")
    for number, line in rows:
        where = f"{key}: {file}, line {number}"
        if line.lower().endswith(LISTS):
            raise UserError(f"{where}: {line!r}: a list names shards, not other lists")
        yield accept(line if is_remote(line) else str(file.parent / Path(line).expanduser()), where)
