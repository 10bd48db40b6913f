"""safetensors headers made to harm: one line, and no memory is taken for what they claim."""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from amclip_ds import safetensors_header
from amclip_ds.errors import UserError
from amclip_ds.model.pretrained import Source


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(**other: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | other}


HARMFUL = {
    "a text multiplied": entry(shape=[3_000_000_000, "x"]),
    "a list multiplied": entry(shape=[3_000_000_000, [0]]),
    "a text for a shape": entry(shape="x" * 16),
    "true for a size": entry(shape=[True]),
    "a fraction": entry(shape=[1.0]),
    "huge sizes": entry(shape=[(1 << 62)] * 16),
    "a size of 4000 digits": b'{"a": {"dtype": "F32", "shape": [' + b"9" * 4000 + b'], "data_offsets": [0, 4]}}',
    "a size of 5000 digits": b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
    "negative": entry(shape=[-1], data_offsets=[4, 0]),
    "one offset": entry(data_offsets=[4]),
    "offsets of another kind": entry(data_offsets={"0": 4}),
    "beyond the file": entry(shape=[1 << 40], data_offsets=[0, 4 << 40]),
    "an unknown dtype": entry(dtype="F31"),
    "a dtype of another kind": entry(dtype=["F32"]),
    "no tensor": {"a": 3},
    "metadata of another kind": {"__metadata__": [1]} | entry(),
    "metadata of numbers": {"__metadata__": {"step": 7}} | entry(),
    "deep": b"[" * 100_000,
    "no object": [1, 2],
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_header_is_one_line_and_takes_no_memory(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "model.safetensors", HARMFUL[name], bytes(4))
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as refused:
            safetensors_header.read(path)
        with pytest.raises(UserError):
            Source(path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_length_beyond_the_file_is_not_believed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="claims 4000000000 bytes in a file of"):
        safetensors_header.read(write(tmp_path / "a", entry(), bytes(4), length=4_000_000_000))
    (tmp_path / "b").touch()
    os.truncate(tmp_path / "b", 4 << 30)
    with pytest.raises(UserError, match="not a safetensors file"):
        safetensors_header.read(tmp_path / "b")


@pytest.mark.parametrize("key", ["master|a|0", "master|a|\u0661|1", "master|a|-1|1", "MASTER|a|0|1", "|||"])
def test_forged_names_of_pieces_are_refused(tmp_path: Path, key: str) -> None:
    save_file({key: torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no name of a piece"):
        Source(tmp_path / "model.safetensors")


def test_what_the_library_writes_is_read_with_every_dtype(tmp_path: Path) -> None:
    """The twin: strictness does not refuse whole files."""
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    dtypes += [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16]
    tensors = {str(dtype): torch.zeros(2, 0 if dtype == torch.int8 else 3).to(dtype) for dtype in dtypes}
    save_file(tensors | {"scalar": torch.tensor(1.0)}, tmp_path / "a", metadata={"step": "12"})
    header = safetensors_header.read(tmp_path / "a")
    assert header.entries.keys() == tensors.keys() | {"scalar"} and header.entries["scalar"].shape == ()
    assert safetensors_header.step_of(tmp_path / "a", header.metadata) == 12
    (tmp_path / "link").symlink_to("a")  # as in a cache of downloads
    assert safetensors_header.read(tmp_path / "link") == header


@pytest.mark.parametrize("step", ["\u0663", "-1", "1e3", "", "x", "1" * 20])
def test_a_step_that_is_none_is_refused(tmp_path: Path, step: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a", metadata={"step": step})
    with pytest.raises(UserError, match="no number of a step"):
        safetensors_header.step_of(tmp_path / "a", safetensors_header.read(tmp_path / "a").metadata)
