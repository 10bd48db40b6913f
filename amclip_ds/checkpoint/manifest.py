"""What a checkpoint is: the layout of its folder, its manifest, and the check that a folder is what its manifest says.

    checkpoints/step_00001000/                         was .tmp-step_00001000: one rename is the commit
      model/ optim/ ema/ rank0000.safetensors          fp32 pieces, `kind|parameter|start|length`
      replicated.safetensors                           buffers, the same on every rank
      rng/rank0000.json  trainer.json  config.yaml
      manifest.json                                    size and sha256 of every file, written last
    checkpoints/latest                                 a hint; the truth is the newest folder that verifies

docs/checkpoint-format.md says it for other programs. Nothing here is collective, nothing is pickled.
"""

import hashlib
import json
import os
import re
import stat
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from amclip_ds import files, plain_yaml
from amclip_ds.checkpoint import tensorfile
from amclip_ds.checkpoint.tensorfile import DamagedError
from amclip_ds.checkpoint.writer import sha256_of
from amclip_ds.errors import UserError
from amclip_ds.safetensors_header import PIECE, Entry

FORMAT, VERSION = "amclip_ds checkpoint", 1
NAME = "manifest.json"
FILES = re.compile(
    r"(model|optim|ema)/rank\d{4,6}\.safetensors|rng/rank\d{4,6}\.json|replicated\.safetensors|trainer\.json|config\.yaml"
)
STEP_FOLDER = re.compile(r"step_(\d{8,12})")
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
    if folder.name != folder_name(manifest.step) and STEP_FOLDER.fullmatch(folder.name):
        raise DamagedError(f"{path}: is of step {manifest.step}, not of {folder.name}")
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from an ordinary file of bounded size. Raises DamagedError."""
    try:
        return files.read_json(path, dict, follow=False)
    except UserError as error:
        raise DamagedError(str(error)) from None


def read_config(folder: Path) -> str:
    """The text of config.yaml. Raises DamagedError."""
    try:
        return files.read_text(folder / "config.yaml", plain_yaml.MAX_BYTES, follow=False)
    except UserError as error:
        raise DamagedError(str(error)) from None


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Every file is there, ordinary and of its size: cheap, no file is read. Raises DamagedError, naming the file."""
    for name, facts in manifest.files.items():
        path = folder / name
        try:
            for parent in {path.parent, folder}:
                if not stat.S_ISDIR(os.lstat(parent).st_mode):
                    raise DamagedError(f"{parent}: not a folder")
            found = os.lstat(path)
        except OSError as error:
            raise DamagedError(f"{path}: {'missing' if error.errno == 2 else error.strerror}") from None
        if not stat.S_ISREG(found.st_mode):
            raise DamagedError(f"{path}: not an ordinary file")
        if found.st_size != facts["bytes"]:
            raise DamagedError(f"{path}: {found.st_size} bytes, the manifest says {facts['bytes']}")


def check_hash(folder: Path, manifest: Manifest, name: str) -> None:
    """Reads one whole file. Raises DamagedError, naming it."""
    path = folder / name
    try:
        found = sha256_of(path)
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read: {error.strerror}") from None
    if found != manifest.files[name]["sha256"]:
        raise DamagedError(f"{path}: its content does not match its hash in the manifest")


def verify(folder: Path) -> Manifest:
    """Reads and checks everything, alone. Raises DamagedError, naming the file."""
    manifest = read(folder)
    check_sizes(folder, manifest)
    Index(folder, manifest)  # first: it costs nothing
    for name in manifest.files:
        check_hash(folder, manifest, name)
    return manifest


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of a parameter, in a file."""

    start: int
    length: int
    file: str
    begin: int
    entry: Entry


class Index:
    """Where each element of each tensor of a checkpoint lies. Raises DamagedError unless all are there, each once."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.pieces: dict[tuple[str, str], list[Piece]] = {}
        for file in manifest.files:
            if "/" in file and file.endswith(".safetensors"):
                self._add(file)
        for kind, names in manifest.tensors.items():
            for name, numel in names.items():
                self._check_covered(kind, name, numel)
        extra = [key for key in self.pieces if key[1] not in manifest.tensors.get(key[0], {})]
        if extra:
            raise DamagedError(f"{self.pieces[extra[0]][0].file}: holds {extra[0][1][:200]!r}, unknown to the manifest")

    def _add(self, file: str) -> None:
        path = self.folder / file
        entries, begin = tensorfile.read_header(path)
        for key, entry in entries.items():
            kind, name, start, length = parse_key(path, key, entry)
            if FOLDER_OF_KIND.get(kind, "optim") != file.split("/")[0]:
                raise DamagedError(f"{path}: holds {kind[:50]!r}, which belongs into another folder")
            self.pieces.setdefault((kind, name), []).append(Piece(start, length, file, begin, entry))

    def _check_covered(self, kind: str, name: str, numel: int) -> None:
        pieces = sorted(self.pieces.get((kind, name), []), key=lambda piece: piece.start)
        at = 0
        for piece in pieces:
            if piece.start != at:
                what = "twice" if piece.start < at else "not at all"
                raise DamagedError(f"{self.folder / piece.file}: elements of {kind} {name} stand in the files {what}")
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


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def list_steps(checkpoints: Path) -> list[tuple[int, Path]]:
    """The committed folders, oldest first, valid or not."""
    try:
        names = os.listdir(checkpoints)
    except FileNotFoundError:
        return []
    found = [(int(match[1]), checkpoints / match[0]) for name in names if (match := STEP_FOLDER.fullmatch(name))]
    return sorted(found)


def _own_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_fields(manifest: Manifest) -> None:
    """Raises ValueError or TypeError where a field has not the type it should have."""
    for number in (manifest.step, manifest.stage, manifest.attempt):
        _need(type(number) is int and number >= 0)
    _need(type(manifest.world_size) is int and manifest.world_size >= 1)
    _need(isinstance(manifest.precision, str) and isinstance(manifest.time, int | float))
    for facts in manifest.files.values():
        _need(type(facts["bytes"]) is int and facts["bytes"] >= 0)
        _need(re.fullmatch(r"[0-9a-f]{64}", facts["sha256"]) is not None)
    for names in manifest.tensors.values():
        _need(all(type(numel) is int and numel >= 0 for numel in names.values()))
    for shape in manifest.shapes.values():
        _need(isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape))
    for texts in (manifest.hashes, manifest.versions):
        _need(isinstance(texts, dict) and all(isinstance(text, str) for text in texts.values()))
    _need(isinstance(manifest.drift, list) and all(isinstance(line, str) for line in manifest.drift))


def _need(condition: bool) -> None:
    if not condition:
        raise ValueError("a field has not the type it should have")
