"""Runs test cases on real ranks: a server process imports torch and deepspeed once, then forks the ranks of each case.

    results = run_ranks("tests.distributed.cases:my_case", world_size=2, timeout_s=180, stage=2)

calls `my_case(stage=2)` on two processes that have RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* set, and returns what
each returned, by rank. An exception on a rank is raised here with its traceback; after `timeout_s` every rank is
killed. Each case has processes of its own, so that a ZeRO-3 engine's patches of torch never reach another case.
"""

import atexit
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What ranks import on their way through a run, its report and its export: 1.5 s of CPU a rank, here once for all.
OURS = ("amclip_ds.commands.train", "amclip_ds.report.page", "amclip_ds.train")
MODELS = ("deepspeed", "open_clip", "timm", "tokenizers", "transformers.models.clip.modeling_clip")
WARM = (*OURS, *MODELS, "jinja2", "PIL.ImageDraw", "rich.progress", "rich.table", "tensorboard.summary")
_server: subprocess.Popen | None = None


class RankFailed(AssertionError):
    """A rank raised, died or ran out of time; the message holds every rank's traceback and exit status."""


def run_ranks(
    case: str, world_size: int = 2, timeout_s: float = 180, env: dict[str, str] | None = None, **kwargs: Any
) -> list[Any]:
    """Runs `case` ("module:function") on `world_size` forked ranks. Returns each rank's result, in rank order."""
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        request = {"case": case, "world_size": world_size, "kwargs": kwargs, "folder": folder, "env": env or {}}
        statuses = _ask(request | {"timeout_s": timeout_s})
        results, failures = [], []
        for rank, status in enumerate(statuses):
            file = Path(folder, f"{rank}.pickle")
            ok, value = pickle.loads(file.read_bytes()) if file.exists() else (False, "wrote no result")
            if not ok or status != 0:
                failures.append(f"--- rank {rank}, exit status {status}\n{value}")
            results.append(value)
        if failures:
            raise RankFailed(f"{case} on {world_size} ranks:\n" + "\n".join(failures))
        return results


def run_alone(case: str, timeout_s: float = 180, env: dict[str, str] | None = None, **kwargs: Any) -> Any:
    """Runs `case` in a fresh interpreter that no launcher started: a forked process cannot use a GPU."""
    with tempfile.TemporaryDirectory(prefix="alone-") as folder:
        Path(folder, "request").write_bytes(pickle.dumps((case, kwargs)))
        command = [sys.executable, "-m", "tests.harness", folder]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | (env or {}), timeout=timeout_s, capture_output=True)
        answer = Path(folder, "answer")
        ok, value = pickle.loads(answer.read_bytes()) if answer.exists() else (False, "wrote no result")
    if not ok:
        raise RankFailed(f"{case}, exit status {done.returncode}:\n{value}\n{done.stderr.decode()[-3000:]}")
    return value


def _ask(request: dict[str, Any]) -> list[int | str]:
    """Sends one request to the server (started on first use); returns the ranks' exit statuses."""
    global _server
    if _server is None or _server.poll() is not None:
        command = [sys.executable, "-m", "tests.harness"]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        _server = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(_server.kill)
    assert _server.stdin and _server.stdout
    pickle.dump(request, _server.stdin)
    _server.stdin.flush()
    try:
        return pickle.load(_server.stdout)
    except EOFError:
        raise RankFailed(f"the rank server died while running {request['case']}") from None
    except BaseException:  # a time limit's, Ctrl-C: the answer still to come would be taken for the next request's
        _server.kill()
        _server.wait()
        _server = None
        raise


def _serve() -> None:
    """The server's loop: import once, then fork the ranks of each request and wait for them."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the imports and the ranks print goes to standard error
    import torch

    from amclip_ds.data.captions import build_tokenizer
    from amclip_ds.engine.light_imports import import_muon_uncompiled

    torch.set_num_threads(1)
    for module in WARM:
        importlib.import_module(module)
    import_muon_uncompiled()
    build_tokenizer()

    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_run(request), answers)
        answers.flush()


def _run(request: dict[str, Any]) -> list[int | str]:
    from amclip_ds.ranks.launcher_env import free_port

    port = free_port()
    pids = [_fork(rank, port, request) for rank in range(request["world_size"])]
    statuses: list[int | str] = [""] * len(pids)
    deadline, failed_at = time.monotonic() + request["timeout_s"], None
    waiting = set(range(len(pids)))
    while waiting:
        for rank in sorted(waiting):
            pid, status = os.waitpid(pids[rank], os.WNOHANG)
            if pid:
                waiting.discard(rank)
                statuses[rank] = os.waitstatus_to_exitcode(status)
                if statuses[rank] != 0 and failed_at is None:
                    failed_at = time.monotonic()
        grace_over = failed_at is not None and time.monotonic() > failed_at + 15
        if waiting and (time.monotonic() > deadline or grace_over):
            for rank in waiting:
                os.kill(pids[rank], signal.SIGUSR2)  # prints its stacks (faulthandler)
            time.sleep(0.5)
            for rank in waiting:
                os.killpg(pids[rank], signal.SIGKILL)
                os.waitpid(pids[rank], 0)
                statuses[rank] = "killed: another rank failed" if grace_over else "killed: out of time"
            break
        time.sleep(0.01)
    return statuses


def _fork(rank: int, port: int, request: dict[str, Any]) -> int:
    server, pid = os.getpid(), os.fork()
    if pid:
        return pid
    import faulthandler

    from amclip_ds.launch import die_with_parent

    status = 1
    try:
        os.setpgid(0, 0)
        die_with_parent(server)
        faulthandler.register(signal.SIGUSR2, all_threads=True)
        world = str(request["world_size"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | request["env"])
        outcome = _outcome(request["case"], request["kwargs"])
        status = 0 if outcome[0] else 1
    except BaseException:
        outcome = False, traceback.format_exc()
    file = Path(request["folder"], f"{rank}.pickle")
    file.write_bytes(pickle.dumps(outcome))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _outcome(case: str, kwargs: dict[str, Any]) -> tuple[bool, Any]:
    """(True, what the case returned) or (False, its traceback)."""
    module, function = case.split(":")
    try:
        return True, getattr(importlib.import_module(module), function)(**kwargs)
    except BaseException:
        return False, traceback.format_exc()


def _run_alone(folder: Path) -> None:

    case, kwargs = pickle.loads((folder / "request").read_bytes())
    (folder / "answer").write_bytes(pickle.dumps(_outcome(case, kwargs)))
    os._exit(0)


if __name__ == "__main__":
    _run_alone(Path(sys.argv[1])) if len(sys.argv) > 1 else _serve()
