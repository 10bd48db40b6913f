"""Mutated exports, runs, checkpoints and evaluation folders through the commands: nothing runs, nothing hangs.

Each mutation has a number and can be repeated alone:  python -m tests.unit.test_mutated_folders NUMBER
In one process, watched by an audit hook: no process starts, nothing of a folder is imported or executed, no file
outside the given folders is opened; every command ends with code 0 or 2, one line, in seconds and bounded memory.
"""

import contextlib
import io
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from amclip_ds import config as settings
from amclip_ds import jsonl
from amclip_ds.cli import main
from amclip_ds.display import printable
from amclip_ds.evaluate.datasets import open_set
from tests.unit.checkpoint.test_save import save_steps
from tests.unit.evaluate.exports import FORMATS, tiny_model, write_export
from tests.unit.evaluate.test_encoder import write_set
from tests.unit.mutations import copy_by_links, mutate
from tests.unit.report.runs import eventful
from tests.unit.report.test_pictures import store

MAX_CPU_S = 10.0
MAX_WALL_S = 120.0  # tests run side by side on loaded machines; what blocks for ever is seen all the same
MAX_GROWTH = 1_000_000  # kB above what the first commands on whole folders took
ROUNDS = 150
REPORTS = 60
NIGHTLY = 10_000
STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "pty.spawn",
    "socket.connect",
    "socket.getaddrinfo",
    "ctypes.dlopen",
    "webbrowser.open",
)

pytestmark = pytest.mark.slow


class Watch:
    """What the audit hook saw while it was on. A hook stays for good, so there is one."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] = ()
        self.forbidden_code = ""
        self.seen: list[str] = []
        self.is_on = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if event in STARTS and not self._is_own(event, args):
            self.seen.append(f"{event} {str(args)[:200]}")
        elif event == "exec" and self.forbidden_code in str(getattr(args[0], "co_filename", "")):
            self.seen.append(f"code of {args[0].co_filename}")
        elif (
            event == "open"
            and isinstance(args[0], str | bytes)
            and not (
                args[2] & os.O_NOFOLLOW and os.path.islink(args[0])  # which is refused by the system
            )
        ):
            self.is_on = False
            path = os.path.realpath(os.fsdecode(args[0]).replace("\0", "?"))
            self.is_on = True
            if not f"{path}/".startswith(self.allowed):
                self.seen.append(f"open {path}")

    @staticmethod
    def _is_own(event: str, args: tuple[Any, ...]) -> bool:
        """The process group's own store, on this machine; a library of the environment's own."""
        if event == "socket.connect":
            return not isinstance(args[1], tuple) or args[1][0] in ("127.0.0.1", "::1")
        if event == "socket.getaddrinfo":
            return args[0] in ("127.0.0.1", "localhost", None, "")
        return event == "ctypes.dlopen" and (
            args[0] is None or "/" not in str(args[0]) or str(args[0]).startswith(sys.prefix)
        )


WATCH: list[Watch] = []


class Folders:
    """The whole folders, and the commands that are given a mutated copy of one of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.outside = root, root.parent / f"{root.name}-outside"
        self.outside.mkdir(parents=True, exist_ok=True)
        (self.outside / "secret.safetensors").write_bytes(b"secret")
        os.environ["MUTATION_OUTSIDE"] = str(self.outside / "secret.safetensors")
        for fmt in FORMATS:
            write_export(fmt, root / "export" / fmt)
        module, config = tiny_model()
        run = root / "run"
        save_steps(run / "checkpoints", 1, 2)
        (run / "config.yaml").write_text(settings.dump(config))
        save_file(module.state_dict(), run / "student.safetensors", metadata={"step": "2"})
        store(eventful(root / "logs"))
        write_set(root / "set", num_images=10, num_classes=5)
        shutil.copytree(root / "set" / "test", root / "set" / "train")  # what the k-NN learns from
        self.bin = root / "bin"
        self.bin.mkdir()
        for name in ("gs", "curl", "git", "sh", "wget", "hostname"):
            (self.bin / name).write_text(f"#!/bin/sh\n: > {root}/canary\n")
            (self.bin / name).chmod(0o755)

    def commands(self, number: int) -> tuple[str, list[list[str]]]:
        """Which folder is spoilt, and what is run on the copy in `mutant`."""
        mutant, whole = str(self.root / "mutant"), str(self.root / "set")
        evaluate = ["--no-append", "--batch-size", "2"]
        kinds: list[tuple[str, list[list[str]]]] = [
            *(
                (
                    f"export/{fmt}",
                    [["eval", mutant, "--data", whole, *evaluate, *(["--task", "knn"] if fmt == "timm" else [])]],
                )
                for fmt in ("open_clip", "timm", "hf", "onnx")
            ),
            ("export/open_clip", [["eval", mutant, "--data", whole, *evaluate, "--preprocess", "library"]]),
            ("export/timm", [["eval", mutant, "--data", whole, *evaluate, "--task", "knn"]]),
            ("run", [["eval", mutant, "--data", whole, *evaluate]]),
            ("run", [["recipes", f"{mutant}/config.yaml"]]),
            (
                "run",
                [
                    ["checkpoints", mutant],
                    ["checkpoints", mutant, "verify"],
                    ["checkpoints", mutant, "consolidate", "--out", f"{mutant}.safetensors"],
                ],
            ),
            (
                "run/checkpoints/step_00000002",
                [
                    ["checkpoints", f"{mutant}-run", "verify"],
                    ["checkpoints", f"{mutant}-run", "prune", "--keep-last", "1"],
                ],
            ),
            ("set", [["eval", str(self.root / "run"), "--data", mutant, *evaluate]]),
            ("set", [["eval", str(self.root / "run"), "--data", mutant, *evaluate, "--task", "knn"]]),
        ]
        return kinds[number % len(kinds)]

    def report(self, number: int) -> tuple[str, list[list[str]]]:
        """The same, of the report: a run's rows and pictures are spoilt."""
        return "logs", [["report", str(self.root / "mutant"), "--out", str(self.root / "mutant.html")]]


CommandsOf = Callable[[Folders, int], tuple[str, list[list[str]]]]


@contextlib.contextmanager
def watched(folders: Folders, may_link: bool = False) -> Iterator[Watch]:
    """may_link: people's own runs and sets may be links to other disks; a stranger's export and checkpoint may not."""
    if not WATCH:
        WATCH.append(Watch())
    watch = WATCH[0]
    given = (
        sys.prefix,
        sys.base_prefix,
        Path(__file__).resolve().parents[2],
        folders.root,
        "/proc",
        "/sys",
        "/dev",
        "/usr",
        "/lib",
        "/etc/localtime",
        "/etc/hosts",
        "/etc/nsswitch.conf",
        "/etc/resolv.conf",
        "/etc/ld.so.cache",
        os.environ.get("TORCH_EXTENSIONS_DIR", sys.prefix),
    )
    watch.allowed = tuple(f"{os.path.realpath(place)}/" for place in given)
    watch.allowed += (f"{folders.outside}/",) if may_link else ()
    watch.forbidden_code = str(folders.root)
    watch.seen, watch.is_on = [], True
    try:
        yield watch
    finally:
        watch.is_on = False


def run_one(folders: Folders, number: int, commands_of: CommandsOf) -> list[str]:
    """What is wrong with the commands on one mutation; nothing, normally."""
    kind, commands = commands_of(folders, number)
    mutant = folders.root / "mutant"
    for left in (mutant, folders.root / "mutant-run"):
        shutil.rmtree(left, ignore_errors=True)
    copy_by_links(folders.root / kind, mutant)
    done = mutate(mutant, number)
    if kind.startswith("run/"):
        copy_by_links(folders.root / "run", folders.root / "mutant-run")
        shutil.rmtree(folders.root / "mutant-run" / kind.removeprefix("run/"))
        mutant.rename(folders.root / "mutant-run" / kind.removeprefix("run/"))
    return [
        f"{number} ({kind}: {done}): amclip {command[0]} {command[1:3]}: {wrong}"
        for command in commands
        for wrong in _run(folders, command, kind in ("run", "set", "logs"))
    ]


def _run(folders: Folders, command: list[str], may_link: bool = False) -> list[str]:
    open_set.cache_clear()
    out, error, wrong = io.StringIO(), io.StringIO(), []

    def too_long(*_: Any) -> None:
        raise TimeoutError("still running")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(int(MAX_WALL_S))
    began, code = time.process_time(), None
    try:
        with watched(folders, may_link) as watch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            code = main(command)
    except SystemExit as leaving:
        code = leaving.code
    except BaseException as failure:
        if isinstance(failure, KeyboardInterrupt):
            raise
        wrong.append(f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]} {_where(failure)}")
    finally:
        signal.alarm(0)
    took = time.process_time() - began
    wrong += [f"it did: {what}" for what in dict.fromkeys(watch.seen)]
    if code not in (0, 2) and not wrong:
        wrong.append(f"code {code}: {error.getvalue()[-300:]}")
    said = [line for line in error.getvalue().splitlines() if line.startswith("amclip ")]
    if code == 2 and len(said) != 1 and "verify" not in command:
        wrong.append(f"{len(said)} lines: {error.getvalue()[-300:]!r}")
    if any(line != printable(line) for line in said):
        wrong.append(f"raw text: {said}")
    if took > MAX_CPU_S:
        wrong.append(f"{took:.0f} s")
    if (folders.root / "canary").exists():
        wrong.append("a program was started")
        (folders.root / "canary").unlink()
    return wrong


def _where(failure: BaseException) -> str:
    trace, place = failure.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        place = f"{place} {Path(file).name}:{trace.tb_lineno}" if "amclip_ds" in file else place
        trace = trace.tb_next
    return place


def run_many(root: Path, numbers: range, commands_of: CommandsOf = Folders.commands) -> list[str]:
    """All of them, with memory watched over all. The whole folders first: what they load is loaded then."""
    folders = Folders(root)
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{folders.bin}{os.pathsep}{path}"
    wrong: list[str] = []
    try:
        for number in range(12):
            kind, commands = commands_of(folders, number)
            copy_by_links(folders.root / kind, folders.root / "mutant")
            copy_by_links(folders.root / "run", folders.root / "mutant-run")
            for command in commands:
                _run(folders, command)
        before = peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in numbers:
            wrong += run_one(folders, number, commands_of)
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if now - peak > 100_000:
                print(f"{number}: {(now - before) / 1000:.0f} MB above the start")
            if now - before > MAX_GROWTH >= peak - before:
                wrong.append(f"{number}: {(now - before) / 1000:.0f} MB above the start")
            peak = max(peak, now)
    finally:
        os.environ["PATH"] = path
    print(f"{len(numbers)} mutations, {len(wrong)} wrong, {(peak - before) / 1000:.0f} MB above the start")
    return wrong


def test_whole_folders_are_evaluated(tmp_path: Path) -> None:
    """The twin: each command on its folder as it is."""
    folders = Folders(tmp_path / "whole")
    for kind, commands in [*map(folders.commands, range(12)), folders.report(0)]:
        copy_by_links(folders.root / kind, folders.root / "mutant")
        copy_by_links(folders.root / "run", folders.root / "mutant-run")
        for command in commands:
            with contextlib.redirect_stdout(io.StringIO()):
                assert main(command) == 0, (kind, command)


def test_the_watch_sees_what_it_should(tmp_path: Path) -> None:
    """The twin of the twin: each thing that no command may do."""
    folders = Folders(tmp_path / "seen")
    (folders.root / "trap.py").write_text("1")
    trap = compile("1", str(folders.root / "trap.py"), "exec")
    for act in (
        lambda: os.system("true"),
        lambda: subprocess.run(["true"]),
        lambda: exec(trap),
        lambda: open(os.environ["MUTATION_OUTSIDE"]).close(),
        lambda: socket.getaddrinfo("stranger.example", 80),
    ):
        with watched(folders) as watch, contextlib.suppress(OSError):
            act()
        assert watch.seen


def test_mutations(tmp_path: Path) -> None:
    assert not run_many(tmp_path / "all", range(ROUNDS))


def test_mutated_rows_of_a_run_have_a_report(tmp_path: Path) -> None:
    assert not run_many(tmp_path / "all", range(REPORTS), Folders.report)


def test_a_report_that_takes_any_row_fails_on_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: without the test of a row's fields the same mutations end in tracebacks."""
    parse = jsonl.parse
    monkeypatch.setattr(jsonl, "parse", lambda line, fields: parse(line))
    assert any("Error" in wrong for wrong in run_many(tmp_path / "all", range(REPORTS), Folders.report))


@pytest.mark.nightly
@pytest.mark.timeout(4 * 3600)
def test_many_mutations(tmp_path: Path) -> None:
    assert not run_many(tmp_path / "all", range(NIGHTLY))
    assert not run_many(tmp_path / "reports", range(NIGHTLY), Folders.report)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        numbers = [int(word) for word in sys.argv[1:]]
        found = run_many(Path(place) / "all", range(numbers[0], numbers[-1] + 1))
    print("\n".join(found))
