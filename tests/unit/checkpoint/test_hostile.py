"""Files made to harm: refused in bounded memory, nothing run, nothing written; and the reader against random bytes."""

import random
import tracemalloc
from pathlib import Path

import pytest

from amclip_ds.checkpoint import manifest, tensorfile
from amclip_ds.checkpoint.tensorfile import DamagedError
from tests.unit.checkpoint.damage import DAMAGES, HINTS, file_named, newest
from tests.unit.checkpoint.test_save import save_steps

BOUND = 64 << 20
NEEDS_TWO_RANKS = {"swapped shards", "deleted shard", "a rank left out, sealed", "bit flip in a shard"}


@pytest.mark.parametrize("name", sorted(DAMAGES.keys() - HINTS.keys() - NEEDS_TWO_RANKS - {"latest to nowhere"}))
def test_a_refusal_names_the_file_and_stays_small(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "checkpoints"
    save_steps(root, 1, 2)
    manifest.verify(newest(root))
    DAMAGES[name](root)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    tracemalloc.start()
    with pytest.raises(DamagedError) as refusal:
        manifest.verify(newest(root))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert file_named(name) in str(refusal.value)
    assert peak < BOUND, f"{peak / 1e6:.0f} MB for a refusal"
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before, "nothing was run, nothing was written"


def test_random_headers_never_do_worse_than_a_refusal(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    original = (newest(tmp_path) / "model/rank0000.safetensors").read_bytes()
    dice, path, refused = random.Random(0), tmp_path / "mutated.safetensors", 0
    for _ in range(400):
        content = bytearray(original[:2000])
        for _ in range(dice.randint(1, 8)):
            content[dice.randrange(400)] = dice.randrange(256)
        path.write_bytes(content)
        try:
            tensorfile.read_header(path)
        except DamagedError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused == 400, "the file is cut short, so that no header can fit it"


def test_a_whole_file_is_not_refused(tmp_path: Path) -> None:
    """The twin: the reader's strictness does not come from refusing everything."""
    save_steps(tmp_path, 1)
    entries, begin = tensorfile.read_header(newest(tmp_path) / "model/rank0000.safetensors")
    assert len(entries) == 4 and begin % 64 == 0
