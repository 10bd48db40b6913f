"""Ways to spoil the newest checkpoint of a folder, by accident or on purpose. Each is a function of the folder.

`reseal` makes a forger's work whole again: sizes, hashes and the manifest's own hash fit the spoilt content.
"""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amclip_ds.checkpoint import step_folders

CANARY = "hostile-code-was-run"


def newest(root: Path) -> Path:
    return step_folders.list_steps(root)[-1][1]


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


def edit(root: Path, change: Callable[[dict[str, Any]], None], seal: bool) -> None:
    """Changes the manifest's content; `seal` makes its own hash fit."""
    path = newest(root) / "manifest.json"
    content = json.loads(path.read_text())
    own = content.pop("sha256")
    change(content)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    content["sha256"] = hashlib.sha256(canonical).hexdigest() if seal else own
    path.write_text(json.dumps(content))


def reseal(root: Path, name: str) -> None:
    path = newest(root) / name

    def change(content: dict[str, Any]) -> None:
        content["files"][name] = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    edit(root, change, seal=True)


def replace(root: Path, name: str, content: bytes) -> None:
    (newest(root) / name).write_bytes(content)
    reseal(root, name)


def with_header(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def swap(root: Path) -> None:
    a, b = newest(root) / "model/rank0000.safetensors", newest(root) / "model/rank0001.safetensors"
    a.rename(a.with_suffix(".swap"))
    b.rename(a)
    a.with_suffix(".swap").rename(b)


def older_shard(root: Path) -> None:
    """A shard of the checkpoint before, the same size."""
    shutil.copy(step_folders.list_steps(root)[-2][1] / "model/rank0000.safetensors", newest(root) / "model")


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (CANARY,)


def escaping(root: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["files"]["../../escaped"] = content["files"].pop("model/rank0000.safetensors")

    edit(root, change, seal=True)


def drop_a_rank(root: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        for name in [name for name in content["files"] if "rank0001" in name]:
            del content["files"][name]

    edit(root, change, seal=True)


def link(root: Path, target: str) -> None:
    path = newest(root) / "model/rank0000.safetensors"
    path.unlink()
    path.symlink_to(target)


def linked_folder(root: Path) -> None:
    folder = newest(root) / "model"
    folder.rename(root / "elsewhere")
    folder.symlink_to(root / "elsewhere")


def pipe(root: Path) -> None:
    path = newest(root) / "model/rank0000.safetensors"
    path.unlink()
    os.mkfifo(path)


def sparse(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def truncate(path: Path) -> None:
    sparse(path, path.stat().st_size - 100)


SHARD = "model/rank0000.safetensors"
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit flip in a shard": lambda root: flip(newest(root) / "model/rank0001.safetensors"),
    "bit flip in a header": lambda root: flip(newest(root) / "ema/rank0000.safetensors", 0.00002),
    "bit flip in the buffers": lambda root: flip(newest(root) / "replicated.safetensors", 1.0),
    "bit flip in the counters": lambda root: flip(newest(root) / "trainer.json"),
    "bit flip in the manifest": lambda root: flip(newest(root) / "manifest.json"),
    "truncated shard": lambda root: truncate(newest(root) / "optim/rank0000.safetensors"),
    "deleted shard": lambda root: (newest(root) / "ema/rank0001.safetensors").unlink(),
    "deleted manifest": lambda root: (newest(root) / "manifest.json").unlink(),
    "swapped shards": swap,
    "shard of an older step": older_shard,
    "forged manifest": lambda root: edit(root, lambda content: content.update(step=3), seal=False),
    "forged manifest, sealed": lambda root: edit(root, lambda content: content.update(step=3), seal=True),
    "forged hash, sealed": lambda root: edit(
        root, lambda content: content["files"][SHARD].update(sha256="0" * 64), seal=True
    ),
    "a rank left out, sealed": drop_a_rank,
    "fields of other types, sealed": lambda root: edit(root, lambda content: content.update(files=[1]), seal=True),
    "latest to nowhere": lambda root: (root / "latest").write_text("step_00000007"),
    "pickle for a shard": lambda root: replace(root, SHARD, pickle.dumps(Hostile())),
    "pickle for the manifest": lambda root: (newest(root) / "manifest.json").write_bytes(pickle.dumps(Hostile())),
    "header longer than the file": lambda root: replace(root, SHARD, with_header({}, length=1 << 62)),
    "header of 2 GB": lambda root: (
        sparse(newest(root) / SHARD, 3 << 30),
        (newest(root) / SHARD).open("r+b").write((2 << 30).to_bytes(8, "little")),
        edit(root, lambda content: content["files"][SHARD].update(bytes=3 << 30), seal=True),
    )[0],
    "tensors that overlap": lambda root: replace(
        root, SHARD, with_header({"master|one|0|1": ONE, "master|seven|0|1": ONE}, b"1234")
    ),
    "a tensor outside the file": lambda root: replace(
        root, SHARD, with_header({"master|one|0|1": ONE | {"data_offsets": [4096, 4100]}}, b"1234")
    ),
    "a tensor of a quintillion": lambda root: replace(
        root, SHARD, with_header({"master|one|0|1": ONE | {"shape": [10**18]}}, b"1234")
    ),
    "negative offsets": lambda root: replace(
        root, SHARD, with_header({"master|one|0|1": ONE | {"data_offsets": [-4, 0]}}, b"1234")
    ),
    "a name twice": lambda root: replace(
        root, SHARD, with_header(b'{"a": %s, "a": %s}' % ((json.dumps(ONE).encode(),) * 2), b"1234")
    ),
    "a header without end": lambda root: replace(root, SHARD, with_header(b"[" * 100_000)),
    "manifest that points outside": escaping,
    "manifest of 10 GB": lambda root: sparse(newest(root) / "manifest.json", 10 << 30),
    "manifest nested deeply": lambda root: (newest(root) / "manifest.json").write_bytes(b"[" * 1_000_000) and None,
    "link for a shard": lambda root: link(root, "/etc/passwd"),
    "link for a folder": linked_folder,
    "pipe for a shard": pipe,
    "device for a shard": lambda root: link(root, "/dev/zero"),
}  # type: ignore[dict-item]
NAMED = {  # the file that the refusal must name
    "bit flip in a shard": "model/rank0001.safetensors",
    "bit flip in a header": "ema/rank0000.safetensors",
    "bit flip in the buffers": "replicated.safetensors",
    "bit flip in the counters": "trainer.json",
    "truncated shard": "optim/rank0000.safetensors",
    "deleted shard": "ema/rank0001.safetensors",
    "swapped shards": "model/rank000",
    "latest to nowhere": "latest",
    "link for a folder": "model",
}
HINTS: dict[str, Callable[[Path], None]] = {  # what a resume may pass over, but must report: a hint is only a hint
    "empty latest": lambda root: (root / "latest").write_text("") and None,
    "latest of rubbish": lambda root: (root / "latest").write_text("../../etc") and None,
    "latest to what was removed": lambda root: (root / "latest").write_text("step_00000000") and None,
}
DAMAGES |= HINTS


def file_named(damage: str) -> str:
    default = "manifest.json" if "manifest" in damage or "sealed" in damage else SHARD
    return NAMED.get(damage, {"forged hash, sealed": SHARD}.get(damage, default))
