"""What a checkpoint is: the layout of its folder, its manifest, and the check that a folder is what its manifest says.

    checkpoints/step_00001000/                         was .tmp-step_00001000: one rename is the commit
      model/ optim/ ema/ rank0000.safetensors          fp32 pieces, `kind|parameter|start|length`
      replicated.safetensors                           buffers, the same on every rank
      rng/rank0000.json  trainer.json  config.yaml
      manifest.json                                    size and sha256 of every file, written last
    checkpoints/latest                                 a hint; the truth is the newest folder that verifies

docs/checkpoint-format.md says it for other programs. Nothing here is collective, nothing is pickled. What reads raises
DamagedError for what the checkpoint is, and NotRead for trouble of its file system, which says nothing of it.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from amclip_ds import files, plain_yaml, run_files
from amclip_ds.checkpoint import tensorfile, trainer_json
from amclip_ds.checkpoint.step_folders import STEP_FOLDER, folder_name, list_steps
from amclip_ds.checkpoint.tensorfile import DamagedError
from amclip_ds.checkpoint.writer import sha256_of
from amclip_ds.errors import NotRead, UserError
from amclip_ds.safetensors_header import MAX_DIMENSIONS, PIECE, Entry

FORMAT, VERSION = "amclip_ds checkpoint", 1
NAME = run_files.MANIFEST
FILES = re.compile(
    r"(model|optim|ema)/rank[0-9]{4,6}\.safetensors|rng/rank[0-9]{4,6}\.json"
    r"|replicated\.safetensors|trainer\.json|config\.yaml"
)
REPLICATED = "replicated.safetensors"
ALWAYS = {REPLICATED, "trainer.json", "config.yaml"}
KIND = re.compile(r"[a-z_0-9]{1,64}")
MAX_STEP, MAX_WORLD = 10**12 - 1, 10**6
PRECISIONS = ("float32", "bfloat16", "float16")
FOLDER_OF_KIND = {
    "master": "model",
    "frozen": "model",
    "ema": "ema",
    "ema_frozen": "ema",
}  # every other kind is the optimizer's


@dataclass
class Manifest:
    """What a checkpoint holds. `read` returns only manifests whose fields have the right types."""

    step: int
    world_size: int
    stage: int
    precision: str
    """the compute dtype of the run: float32, bfloat16"""
    files: dict[str, dict[str, Any]]
    """path in the folder -> {"bytes", "sha256"}"""
    tensors: dict[str, dict[str, int]]
    """kind -> parameter -> number of elements, over all files"""
    shapes: dict[str, list[int]]
    """parameter -> shape"""
    time: float
    """when it was written, seconds since 1970"""
    attempt: int = 0
    hashes: dict[str, str] = field(default_factory=dict)
    """config: of config.yaml; data: of the data's index; tokenizer, where there is one"""
    versions: dict[str, str] = field(default_factory=dict)
    drift: list[str] = field(default_factory=list)
    """what was overridden by checkpoint.allow_drift since the run began"""


def dump(manifest: Manifest) -> bytes:
    """The manifest as JSON, with its own hash."""
    content = {"format": FORMAT, "version": VERSION} | asdict(manifest)
    return json.dumps(content | {"sha256": _own_hash(content)}, indent=1, sort_keys=True).encode() + b"\n"


def read(folder: Path) -> Manifest:
    """A folder's manifest, checked for form but not against the files. Raises DamagedError, naming it."""
    path = folder / NAME
    content = read_json(path)
    try:
        if content["format"] != FORMAT:
            raise DamagedError(f"{path}: not a manifest of {FORMAT}s")
        if content["version"] != VERSION:
            raise DamagedError(f"{path}: version {str(content['version'])[:20]}, this program reads version {VERSION}")
        if content.pop("sha256") != _own_hash(content):
            raise DamagedError(f"{path}: its content does not match its own hash")
        del content["format"], content["version"]
        manifest = Manifest(**content)
        _check_fields(manifest)
    except DamagedError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{path}: not a manifest: {type(error).__name__} {str(error)[:200]}") from None
    for name in manifest.files:
        if not FILES.fullmatch(name):
            raise DamagedError(f"{path}: names {name[:200]!r}, which is no file of a checkpoint")
    missing = ALWAYS - manifest.files.keys()
    if missing:
        raise DamagedError(f"{path}: names no {sorted(missing)[0]}, which every checkpoint has")
    if folder.name != folder_name(manifest.step) and STEP_FOLDER.fullmatch(folder.name):
        raise DamagedError(f"{path}: is of step {manifest.step}, not of {folder.name}")
    return manifest


def all_of(checkpoints: Path) -> Iterator[Manifest]:
    """Those of a run that can be read, the oldest first."""
    for _, folder in list_steps(checkpoints):
        try:
            yield read(folder)
        except (UserError, DamagedError, OSError):
            continue


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from an ordinary file of bounded size. Raises DamagedError, NotRead."""
    try:
        return files.read_json(path, dict, follow=False)
    except NotRead:
        raise
    except UserError as error:
        raise DamagedError(str(error)) from None


def read_config(folder: Path) -> str:
    """The text of config.yaml. Raises DamagedError, NotRead."""
    try:
        return files.read_text(folder / "config.yaml", plain_yaml.MAX_BYTES, follow=False)
    except NotRead:
        raise
    except UserError as error:
        raise DamagedError(str(error)) from None


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Every file is there, ordinary and of its size: one stat a file, none is read. Raises DamagedError, naming it, and
    NotRead."""
    looked_at: set[Path] = set()
    for name, facts in manifest.files.items():
        path = folder / name
        try:
            for parent in {path.parent, folder} - looked_at:
                if not stat.S_ISDIR(os.lstat(parent).st_mode):
                    raise DamagedError(f"{parent}: not a folder")
                looked_at.add(parent)
            found = os.lstat(path)
        except OSError as error:
            raise DamagedError(f"{path}: missing") if error.errno == 2 else tensorfile.unread(path, error) from None
        if not stat.S_ISREG(found.st_mode):
            raise DamagedError(f"{path}: not an ordinary file")
        if found.st_size != facts["bytes"]:
            raise DamagedError(f"{path}: {found.st_size} bytes, the manifest says {facts['bytes']}")


def check_hash(folder: Path, manifest: Manifest, name: str) -> None:
    """Reads one whole file. Raises DamagedError, naming it, and NotRead."""
    path = folder / name
    try:
        found = sha256_of(path)
    except OSError as error:
        raise tensorfile.unread(path, error) from None
    if found != manifest.files[name]["sha256"]:
        raise DamagedError(f"{path}: its content does not match its hash in the manifest")


def verify(folder: Path) -> Manifest:
    """Reads and checks everything, alone. Raises DamagedError, naming the file."""
    manifest = read(folder)
    check_sizes(folder, manifest)
    PieceIndex(folder, manifest)  # first: it costs nothing
    for name in manifest.files:
        check_hash(folder, manifest, name)
        check_random(folder, name)
    read_trainer(folder, manifest)
    return manifest


def check_random(folder: Path, name: str) -> None:
    """Reads a file of a rank's generators; any other is left alone. Raises DamagedError."""
    if name.startswith("rng/"):
        trainer_json.check_random(folder / name, read_json(folder / name))


def read_trainer(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """trainer.json, checked. Raises DamagedError."""
    path = folder / "trainer.json"
    return trainer_json.check_trainer(path, read_json(path), manifest.step)


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of a parameter, in a file."""

    start: int
    length: int
    file: str
    begin: int
    entry: Entry


Pieces = list[tuple[tuple[str, str], Piece]]
"""with the kind and name of the tensor that each is of"""


def read_pieces(folder: Path, file: str) -> Pieces:
    """What a file of tensors' pieces holds, by its header; of any other file nothing. Raises DamagedError."""
    if "/" not in file or not file.endswith(".safetensors"):
        return []
    path, found = folder / file, Pieces()
    entries, begin = tensorfile.read_header(path)
    for key, entry in entries.items():
        kind, name, start, length = parse_key(path, key, entry)
        if FOLDER_OF_KIND.get(kind, "optim") != file.split("/")[0]:
            raise DamagedError(f"{path}: holds {kind[:50]!r}, which belongs into another folder")
        found.append(((kind, name), Piece(start, length, file, begin, entry)))
    return found


class PieceIndex:
    """Where each element of each tensor of a checkpoint is. Raises DamagedError unless all are there, each once."""

    def __init__(self, folder: Path, manifest: Manifest, held: Pieces | None = None) -> None:
        """held: of all files, where they were read already."""
        self.folder, self.manifest = folder, manifest
        self.pieces: dict[tuple[str, str], list[Piece]] = {}
        if held is None:
            held = [piece for file in manifest.files for piece in read_pieces(folder, file)]
        for key, piece in held:
            self.pieces.setdefault(key, []).append(piece)
        for kind, names in manifest.tensors.items():
            for name, numel in names.items():
                self._check_covered(kind, name, numel)
        extra = [key for key in self.pieces if key[1] not in manifest.tensors.get(key[0], {})]
        if extra:
            raise DamagedError(f"{self.pieces[extra[0]][0].file}: holds {extra[0][1][:200]!r}, unknown to the manifest")

    def _check_covered(self, kind: str, name: str, numel: int) -> None:
        pieces = sorted(self.pieces.get((kind, name), []), key=lambda piece: piece.start)
        at = 0
        for piece in pieces:
            if piece.start != at:
                what = "twice" if piece.start < at else "not at all"
                raise DamagedError(f"{self.folder / piece.file}: elements of {kind} {name} are {what} in the files")
            at += piece.length
        if at != numel:
            raise DamagedError(f"{self.folder / NAME}: {kind} {name} has {numel} elements, the files hold {at}")
        self.pieces[kind, name] = pieces


def key_of(kind: str, name: str, start: int, length: int) -> str:
    return f"{kind}|{name}|{start}|{length}"


def parse_key(path: Path, key: str, entry: Entry) -> tuple[str, str, int, int]:
    """(kind, parameter, start, length) of a tensor's name in a file. Raises DamagedError."""
    found = PIECE.fullmatch(key)
    if not found or entry.shape != (int(found[4]),):
        raise DamagedError(f"{path}: {key[:200]!r} is no name of a piece of {list(entry.shape)[:8]} elements")
    return found[1], found[2], int(found[3]), int(found[4])


def _own_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_fields(manifest: Manifest) -> None:
    """Raises ValueError, naming the field, where one has not the type and range it should have."""
    is_count, is_map_of, is_list_of = trainer_json.is_count, trainer_json.is_map_of, trainer_json.is_list_of
    checks: dict[str, trainer_json.Check] = {
        "step": lambda value: is_count(value) and value <= MAX_STEP,
        "world_size": lambda value: is_count(value) and 1 <= value <= MAX_WORLD,
        "stage": lambda value: is_count(value) and value <= 3,
        "attempt": is_count,
        "precision": lambda value: value in PRECISIONS,
        "time": lambda value: trainer_json.is_finite(value) and value >= 0,
        "files": is_map_of(_is_file),
        "tensors": is_map_of(is_map_of(is_count)),
        "shapes": is_map_of(is_list_of(is_count, MAX_DIMENSIONS)),
        "hashes": is_map_of(_is_text),
        "versions": is_map_of(_is_text),
        "drift": is_list_of(_is_text, 10**6),
    }
    for name, check in checks.items():
        if not check(getattr(manifest, name)):
            raise ValueError(f"{name} has not the type or range it should have")
    for kind, names in manifest.tensors.items():
        if not KIND.fullmatch(kind):
            raise ValueError(f"tensors names the kind {kind[:80]!r}")
        for name, numel in names.items() if kind in FOLDER_OF_KIND else ():
            if name not in manifest.shapes or math.prod(manifest.shapes[name]) != numel:
                raise ValueError(f"{kind} {name[:200]!r} has {numel} elements, and not that shape")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_file(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"bytes", "sha256"} or not trainer_json.is_count(value["bytes"]):
        return False
    return isinstance(value["sha256"], str) and re.fullmatch("[0-9a-f]{64}", value["sha256"]) is not None
