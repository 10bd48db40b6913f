"""Mutated tars and images: on any bytes no crash, no hang, bounded memory, and every sample accounted for."""

import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amclip_ds.data.check import CheckConfig, check_shard
from amclip_ds.data.config import View
from amclip_ds.images import BadImage
from amclip_ds.keyed_random import keyed
from amclip_ds.processes import WorkerCrashed, map_in_processes
from amclip_ds.shards import index
from tests.unit.data.damaged import BLOCK, json_fields, picture, sample, tar_of
from tests.unit.data.shards import make_views

SECONDS_EACH = 5.0  # on a loaded machine; a mutant takes milliseconds
MEGABYTES = 400  # of one reading process, above what it had before: an image of the 89 Mpx allowed takes 268
LIMIT = 1 << 22  # pixels allowed here, so that a mutated header cannot ask for more than 12 MB


def base_tar() -> bytes:
    return tar_of(
        sample(0)
        + sample(1, jpg=None, png=picture(1, kind="PNG"))
        + sample(2, jpg=None, webp=picture(2, kind="WEBP"))
        + sample(3, txt=None, json=json_fields(caption="a cat", nested=[{"a": [1, 2]}]))
        + sample(4)
    )


def mutate(content: bytes, random: np.random.Generator, block: int) -> bytes:
    """A few changes: bytes and runs overwritten, blocks dropped, doubled, swapped or zeroed, the end cut."""
    changed = bytearray(content)
    for _ in range(int(random.integers(1, 5))):
        size = len(changed)
        if size < 4 * block:
            break
        at = int(random.integers(size))
        aligned = at // block * block
        match int(random.integers(8)):
            case 0:
                changed[at] = int(random.integers(256))
            case 1:
                changed[at] ^= 1 << int(random.integers(8))
            case 2:
                run = int(random.integers(1, 65))
                changed[at : at + run] = random.bytes(len(changed[at : at + run]))
            case 3:
                del changed[aligned : aligned + block * int(random.integers(1, 4))]
            case 4:
                changed[aligned:aligned] = changed[aligned : aligned + block]
            case 5:
                changed[aligned : aligned + block] = bytes(len(changed[aligned : aligned + block]))
            case 6:
                del changed[at:]
            case _:  # a header's numbers, where most of the trouble is
                aligned = int(random.integers(-(-size // BLOCK))) * BLOCK
                changed[aligned + 124 : aligned + 136] = bytes(
                    random.choice([0, 48, 55, 128, 255], 12).astype(np.uint8)
                )
    return bytes(changed)


def fuzz_tars(job: tuple[str, int, int]) -> dict[str, Any]:
    """Mutants [first, last) checked and indexed, in this process. Returns what broke a rule, and the peak memory."""
    folder, first, last = job
    content, broken, slowest = base_tar(), [], 0.0
    shard = Path(folder) / f"{first}.tar"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(first, last):
        shard.write_bytes(mutate(content, keyed(0, "tar", number), BLOCK))
        began = time.monotonic()
        report = check_shard(CheckConfig(max_pixels=LIMIT), 10, str(shard))
        entry = index.scan_shard(str(shard)).entry
        slowest = max(slowest, time.monotonic() - began)
        whole = report.read == 5
        if report.expected != report.read + report.skipped + report.lost or not (whole or report.problems):
            broken.append((number, report.expected, report.read, report.skipped, report.lost))
        if entry.samples < report.read or entry.samples > report.samples:
            broken.append((number, "indexed", entry.samples, report.read, report.samples))
    shard.unlink()
    return {"broken": broken, "slowest": slowest, "grown": _megabytes_since(before)}


def fuzz_images(job: tuple[str, int, int]) -> dict[str, Any]:
    """Mutated images made into views: crops of the right shape, or BadImage, and nothing else."""
    _, first, last = job
    kinds, broken, slowest, good = ("JPEG", "PNG", "WEBP"), [], 0.0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(first, last):
        random = keyed(0, "image", number)
        content = mutate(picture(number % 7, kind=kinds[number % 3]), random, 16)
        began = time.monotonic()
        try:
            views = make_views(content, random, [View(), View()], 32, 32, max_pixels=LIMIT)
            good += 1
            if views.views.shape != (2, 3, 32, 32) or views.views.dtype != np.uint8:
                broken.append((number, views.views.shape))
        except BadImage:
            pass
        except Exception as error:
            broken.append((number, repr(error)))
        slowest = max(slowest, time.monotonic() - began)
    return {"broken": broken, "slowest": slowest, "grown": _megabytes_since(before), "good": good}


def _megabytes_since(before: int) -> float:
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def fuzz(work: Any, folder: Path, count: int, at_once: int) -> list[dict[str, Any]]:
    jobs = [(str(folder), first, min(count, first + at_once)) for first in range(0, count, at_once)]
    found = list(map_in_processes(work, jobs, processes=2))
    for job, result in zip(jobs, found):
        assert not isinstance(result, WorkerCrashed), f"mutants {job[1]} to {job[2]} ended the process"
        assert not result["broken"], result["broken"][:10]
        assert result["slowest"] < SECONDS_EACH and result["grown"] < MEGABYTES
    return [result for result in found if not isinstance(result, WorkerCrashed)]


def test_500_mutated_tars_and_images(tmp_path: Path) -> None:
    fuzz(fuzz_tars, tmp_path, 250, 125)
    found = fuzz(fuzz_images, tmp_path, 250, 125)
    assert sum(result["good"] for result in found) > 20  # the mutants are not all beyond reading


@pytest.mark.nightly
def test_10000_mutated_tars_and_images(tmp_path: Path) -> None:
    fuzz(fuzz_tars, tmp_path, 5000, 250)
    fuzz(fuzz_images, tmp_path, 5000, 250)


def test_a_reader_that_loses_silently_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules above must fail for a reader that stops at damage without a word."""
    real = index.scan
    monkeypatch.setattr(
        "amclip_ds.data.check.scan", lambda file, size: (m for m in real(file, size) if isinstance(m, index.Member))
    )
    assert fuzz_tars((str(tmp_path), 0, 60))["broken"]
