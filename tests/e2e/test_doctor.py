"""`amclip doctor` where something is truly wrong: a broken machine, and runs that were made not to learn."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from amclip_ds.doctor import FAIL, WARN
from tests.e2e.conftest import Amclip
from tests.e2e.trainers import last_of_each

pytestmark = pytest.mark.nightly

BROKEN = """
mount -t tmpfs -o size=8m tmpfs /dev/shm
mount -t tmpfs -o size=96m tmpfs runs && head -c 90m /dev/zero >runs/full
export RANK=0 PYTHONPATH="$PWD/broken:$PYTHONPATH"
exec env -u WORLD_SIZE -u CXX PATH="$PWD/empty" LD_PRELOAD="$PWD/clock.so" "$@"
"""
WRONG_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t which, struct timespec *now) {
  int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
  int status = real(which, now);
  if (which == CLOCK_REALTIME) now->tv_sec += 3600;
  return status;
}
"""
NAMED = (
    ("launcher", FAIL, "WORLD_SIZE"),
    ("compiler", WARN, "no C++ compiler"),
    ("operators", FAIL, "undefined symbol: jpeg_resync"),
    ("shared memory", WARN, "8 MiB free in /dev/shm"),
    ("disk", FAIL, "GB free"),
    ("clock", WARN, "the disk's server is -3"),
)


def test_a_broken_machine(tmp_path: Path) -> None:
    """Half a launcher, no compiler on PATH, a decoder that does not load, a clock an hour ahead of the disk's and, in a
    mount namespace, a tiny /dev/shm and a full disk."""
    alone = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    compiler = shutil.which("cc")
    if compiler is None or shutil.which("unshare") is None or subprocess.run([*alone, "true"]).returncode:
        pytest.skip("needs mount namespaces, and a C compiler for the wrong clock")
    for name in ("runs", "empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "simplejpeg.py").write_text("raise ImportError('undefined symbol: jpeg_resync')")
    (tmp_path / "clock.c").write_text(WRONG_CLOCK)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "clock.so", "clock.c", "-ldl"], cwd=tmp_path, check=True)
    doctor = [sys.executable, "-m", "amclip_ds", "doctor", "--out", "runs", "--json", "found.json"]
    done = subprocess.run(
        [*alone, "sh", "-c", BROKEN, "sh", *doctor], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
    found = {row["name"]: row for row in json.loads((tmp_path / "found.json").read_text())["findings"]}
    for name, status, said in NAMED:
        assert found[name]["status"] == status and said in found[name]["found"] and found[name]["fix"], found[name]


def rewritten(scenes: Path, folder: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """The training shards with other contents: change(name of a member, its bytes) -> bytes."""
    folder.mkdir()
    for source in sorted((scenes / "train").glob("*.tar")):
        with tarfile.open(source) as old, tarfile.open(folder / source.name, "w") as new:
            for member in old.getmembers():
                held = old.extractfile(member)
                assert held is not None
                content = change(member.name, held.read())
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))
    return folder


def one_caption(name: str, content: bytes) -> bytes:
    return b"an image from the web" if name.endswith(".txt") else content


class FirstImage:
    """Every image becomes the first."""

    def __init__(self) -> None:
        self.first: bytes | None = None

    def __call__(self, name: str, content: bytes) -> bytes:
        if name.endswith((".txt", ".json")):
            return content
        self.first = self.first or content
        return self.first


class CaptionOfTheOneBefore:
    """No image keeps its own."""

    def __init__(self) -> None:
        self.before = b"a red circle"

    def __call__(self, name: str, content: bytes) -> bytes:
        if not name.endswith(".txt"):
            return content
        given, self.before = self.before, content
        return given


@pytest.mark.parametrize(
    ("words", "change", "named"),
    [
        ([], None, {}),
        (["optim.lr=1"], None, {"learning rate": "times what is usual"}),
        (["optim.lr=1e-9"], None, {"learning rate": "times below what is usual", "loss": "at chance"}),
        (["optim.warmup_steps=5000"], None, {"learning rate": "optim.lr is never reached", "loss": "at chance"}),
        ([], one_caption, {"captions": " x 'an image from the web'", "loss": "at chance"}),
        ([], FirstImage(), {"images": "1 different images", "loss": "at chance"}),
        (
            ["optim.lr=1"],
            CaptionOfTheOneBefore(),
            {"logit scale": "pinned at its floor", "features": "collapsed", "loss": "at chance"},
        ),
    ],
    ids=["it learns", "rate too high", "rate too low", "endless warm-up", "one caption", "one image", "other captions"],
)
def test_runs_that_do_not_learn(
    words: list[str],
    change: Callable[[str, bytes], bytes] | None,
    named: dict[str, str],
    scenes: Path,
    tmp_path: Path,
    amclip: Amclip,
) -> None:
    """Each was trained; what is wrong with it is a failure by name, and the run that learns has none."""
    train = rewritten(scenes, tmp_path / "train", change) if change else scenes / "train"
    settings = [
        f"data.train={train}",
        f"eval.data={scenes}",
        f"run.out={tmp_path}/run",
        "run.steps=60",
        "batch.global_size=32",
        "optim.warmup_steps=5",
        "log.every_steps=5",
        "log.pictures_every_steps=0",
        "data.keep_colours=true",
        *words,
    ]
    code, printed = amclip("train", "aclip-tiny", *last_of_each(settings))
    assert code in (0, 3), printed
    code, printed = amclip("doctor", str(tmp_path / "run"), "--json", str(tmp_path / "found.json"))
    rows = [row for row in json.loads((tmp_path / "found.json").read_text())["findings"] if row["status"] == FAIL]
    of_run = {row["name"]: row["found"] for row in rows}
    if not named:
        assert not set(of_run) & {"learning rate", "loss", "captions", "images", "features", "evaluation"}, of_run
    for name, said in named.items():
        assert said in of_run.get(name, ""), (name, printed)
