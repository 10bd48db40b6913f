"""What people give as shards that is none, each named for what it is, with what to do. Loads no torch.

By name (`check_name`), by the first bytes and members of files (`check_contents`), by what a folder holds (`tars_of`,
`check_foreign`). Damage is not checked here: what may be a tar passes.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from amclip_ds import run_files
from amclip_ds.errors import UserError
from amclip_ds.files import not_read, open_regular, outlasting, walk
from amclip_ds.shards.kinds import COMPRESSED, HEAD, IMAGES, NAMES, PACK, kind_by_name, kind_of
from amclip_ds.shards.tar import Member, printable, scan, split_name

HUGGING_FACE = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json")
INDEX = ("meta.json", "samples.bin", "keys.bin", "content.bin")  # what an index holds (index.py)
MEMBERS = 256  # of a tar that are checked
MANY = 10_000  # names of a folder that are checked


def check_name(path: str, shown: str, key: str) -> None:
    """Raises UserError for a file whose name says that it is no tar. shown: the shard as the user knows it."""
    what = kind_by_name(path)
    if what:
        raise UserError(f"{key}: {printable(shown)} is {what}")


def check_contents(paths: list[str], key: str, captioned: bool) -> None:
    """Raises UserError where local files, each of some sampled, begin as something else or, where they are to be
    `captioned`, hold labels without captions. Where a tar is among them, the others are damage, which training bears.
    """
    places = sorted({0, len(paths) // 2, len(paths) - 1}) if paths else ()
    kinds = [_kind_inside(paths[place], captioned) for place in places]
    if kinds and all(kinds):
        raise UserError(f"{key}: {printable(paths[0])} {kinds[0]}")


def _kind_inside(path: str, captioned: bool) -> str:
    """'is a compressed tar: ...', 'holds labels ...'; empty for what may be a tar to train on."""
    try:
        with open_regular(Path(path)) as file:
            head = file.read(HEAD)
            if not head:
                return "is empty: 0 bytes"
            what = kind_of(head)
            if what or not captioned:
                return f"is {what}" if what else ""
            members = islice(scan(file, os.fstat(file.fileno()).st_size), MEMBERS)
            return _lacks_captions(split_name(item.name)[1] for item in members if isinstance(item, Member))
    except (OSError, tarfile.TarError):
        return ""  # whoever reads it says so


def tars_of(folder: Path, key: str) -> list[str]:
    """The tars of a folder and of those below it, in the order of their names. Raises UserError where there is none, or
    where compressed ones are beside them, which would be left out without a word.
    """
    try:
        files = outlasting(f"{key}: {folder}", lambda: sorted(below(folder)))
    except OSError as error:
        raise not_read(f"{key}: {folder}", error) from None
    packed = [Path(path).name for path in files if path.lower().endswith(COMPRESSED)]
    tars = [path for path in files if path.lower().endswith(".tar")]
    if not packed and tars:
        return tars
    name = printable(str(folder))
    if packed:
        beside = f" beside {len(tars)} .tar" if tars else ""
        alone = f"; '{name}/**/*.tar' takes the others alone" if tars else ""
        what = kind_by_name(packed[0]).removeprefix("a compressed tar: ")
        first = printable(packed[0])
        raise UserError(f"{key}: {name} holds {len(packed)} compressed tar(s) ({first}){beside}: {what}{alone}")
    what = _of_folder(folder)
    raise UserError(f"{key}: no .tar file in the folder {name}" + (f"; it holds {what}" if what else ""))


def below(folder: Path) -> list[str]:
    """The paths of what is below a folder. Raises OSError."""
    return [str(Path(at, name)) for at, folders, files in walk(folder) for name in (*folders, *files)]


def is_of_index(name: str) -> bool:
    """Whether a file of that name in an index's folder is the index's, one half written included."""
    return name in INDEX or (name.startswith(".meta.json.") and name.endswith(".partial"))


def check_index_folder(folder: Path, key: str) -> None:
    """Raises UserError where an index cannot be written there: it would replace a file, or what is no index."""
    if not folder.name:
        raise UserError(f"{key}: {folder}: name a folder of its own")
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        if not os.path.lexists(folder):
            return
        raise UserError(f"{key}: {folder} is a link to nothing; name a folder") from None
    except NotADirectoryError:
        raise UserError(f"{key}: {folder} is a file, or below one; name a folder") from None
    except OSError as error:
        raise not_read(f"{key}: {folder} cannot be read", error) from None
    strange = [name for name in names if not is_of_index(name)]
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        first = printable(strange[0])
        raise UserError(f"{key}: {folder} holds other things ('{first}'{more}); name a new or an empty folder")


def check_foreign(spec: str, key: str) -> None:
    """Raises UserError for data that no command reads, so that it is said before anything slow: a table, a Hugging Face
    data set, an archive. What else is wrong is for whoever reads it, and whether a csv lists images to evaluate on.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        if kind_by_name(spec) and path.suffix.lower().lstrip(".") not in (*IMAGES, "csv", "tsv"):
            check_name(spec, spec, key)
        check_head(path, key)
    elif path.is_dir():
        kinds = _kinds_in(path)
        if not kinds["tar"] and not any(kinds[image] for image in IMAGES):
            what = _of_folder(path)
            if what:
                raise UserError(f"{key}: {printable(spec)} holds {what}")


def check_head(path: Path, key: str) -> None:
    """Raises UserError for a file that begins as an archive, a table or a web page."""
    try:
        with open_regular(path) as file:
            what = kind_of(file.read(HEAD))
    except OSError:
        return
    if what:
        raise UserError(f"{key}: {printable(str(path))} is {what}")


def _lacks_captions(suffixes: Iterator[str]) -> str:
    found = {suffix.rpartition(".")[2] for suffix in suffixes}
    if "cls" not in found or found & {"txt", "json"}:
        return ""
    if not found & set(IMAGES):
        return f"holds labels (.cls) without images or captions; {PACK}"
    return f"holds images with labels (.cls) and no captions: it can be evaluated on (eval.data); {PACK}"


def _of_folder(folder: Path) -> str:
    """What a folder without tars holds, and what to do with it; empty where nothing can be said."""
    if any((folder / name).is_file() for name in HUGGING_FACE) or _kinds_in(folder)["arrow"]:
        return f"a Hugging Face data set; {PACK}"
    if (folder / run_files.CONFIG).is_file() and (folder / run_files.METRICS).exists():
        return "a run, not data"
    kinds = _kinds_in(folder)
    images = sum(kinds[image] for image in IMAGES)
    if images:
        captions = "" if kinds["txt"] else ", and no .txt with a caption beside them"
        usual = next(image for image in sorted(IMAGES, key=lambda image: -kinds[image]))
        return f"{images} image(s) (.{usual}){captions}; {PACK}"
    for kind, count in kinds.most_common():
        what = NAMES.get(f".{kind}")
        if what:
            return f"{count} .{kind} file(s): {what}"
    return ""


def _kinds_in(folder: Path) -> Counter[str]:
    """How many names end how, of the first MANY below a folder."""
    names = (name for _, _, files in walk(folder) for name in files)
    found = Counter[str]()
    with suppress(OSError):  # whoever reads it says so
        found.update(name.rpartition(".")[2].lower() for name in islice(names, MANY))
    return found
