"""The watching process of a node: `python watch_ranks.py FOLDER`, started by watchdog.py. Standard library alone.

It runs by its path, so that it imports neither torch nor this package: it costs a few MB and lives when a rank cannot.
FOLDER holds settings.json, and for each rank of the node rankN.beat (phase, step, time of the last sign of life) and
rankN.stacks (where the rank's stacks go when it is asked for them by a signal). When a rank gives no sign of life for
as long as it said its phase may take: the stacks of all ranks, who is to blame, an incident, and the end of every rank.
What is written of that has a time limit each: the run's file system may be what hangs.
"""

import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEAT = struct.Struct("<qqqdd32s")  # process, its start in ticks since boot, step, monotonic time, limit, phase
STACKS_SIGNAL = signal.SIGRTMIN + 5
# In the order in which a rank passes through them.
PHASES = ("start", "verify", "index", "resume", "data", "compile", "step", "save", "evaluate", "end")
COMPILE = "compile"
DONE = "done"
ANSWER_S = 3.0  # a rank's time to print its stacks, the log's to take a line
WRITE_S = 10.0  # a file system's time to take a report
OTHERS_S = 10.0  # the other nodes' time to report
COLLECTIVES = re.compile(
    r"distributed_c10d\.py|deepspeed/comm/|in (_?all_reduce|_?all_gather|reduce_scatter|barrier|"
    r"broadcast|monitored_barrier|wait|_exchange)\b|torch/cuda/.* in synchronize"
)
INNERMOST = 5  # frames in which a collective must show for a rank to count as waiting in it


def read_beat(path: Path) -> dict[str, Any] | None:
    """A rank's last sign of life, or None before its first."""
    try:
        pid, started, step, at, limit_s, phase = BEAT.unpack(path.read_bytes()[: BEAT.size])
    except (OSError, struct.error):
        return None
    name = phase.rstrip(b"\0").decode()
    return {"pid": pid, "started": started, "step": step, "at": at, "limit_s": limit_s, "phase": name}


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot: no later one of its number has it. 0: unknown."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def process_state(pid: int, started: int) -> str:
    """R, S, D, T, ... as in ps; empty if the process is gone (or its number another's, or only a zombie is left)."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" or (started and int(rest[18]) != started) else state


def watch(folder: Path) -> int:
    """Until every rank has ended (0), or one hangs (1)."""
    settings = json.loads((folder / "settings.json").read_text())
    poll_s, over_for, compiled_at = settings["poll_s"], 0, 0.0
    polled_at, resumed_at = time.monotonic(), -math.inf
    while True:
        time.sleep(poll_s)
        beats = read_beats(folder, settings["ranks"])
        at_work = [beat for beat in living(beats) if beat["phase"] != DONE]
        over_for = 0 if at_work else over_for + 1
        if over_for == 2:  # one read may fall into the middle of a write
            return 0
        now = time.monotonic()
        if any(beat["phase"] == COMPILE for beat in at_work):
            compiled_at = now
        # A job that Slurm suspends is stopped whole, this process too: from then on its ranks have their time anew
        if any(now - polled_at > poll_s + beat["limit_s"] / 2 for beat in at_work):
            resumed_at = now
        polled_at = now
        is_hang = any(is_silent(beat, compiled_at) and now - resumed_at > beat["limit_s"] for beat in at_work)
        if is_hang and end_it(folder, settings, beats, now, compiled_at):
            return 1


def read_beats(folder: Path, ranks: list[int]) -> dict[int, dict[str, Any] | None]:
    return {rank: read_beat(folder / f"rank{rank}.beat") for rank in ranks}


def living(beats: dict[int, dict[str, Any] | None]) -> list[dict[str, Any]]:
    """The signs of life of those that still are there."""
    return [beat for beat in beats.values() if beat and process_state(beat["pid"], beat["started"])]


def is_silent(beat: dict[str, Any], compiled_at: float) -> bool:
    """Whether a rank has given no sign of life for longer than it said. In a step it may wait for another one of this
    node, which compiled until compiled_at."""
    since = max(beat["at"], compiled_at) if beat["phase"] == "step" else beat["at"]
    return beat["phase"] != DONE and time.monotonic() - since > beat["limit_s"]


def end_it(
    folder: Path, settings: dict[str, Any], beats: dict[int, dict[str, Any] | None], now: float, compiled_at: float
) -> bool:
    """Stacks, blame, incident; then every rank of this node is killed, with all that it started. False where all gave
    signs of life again meanwhile, as after a pause of the file system: they go on."""
    hosts, own_node = settings["hosts"], settings["node"]
    reaches = len(hosts) == 1 or reaches_meeting(*settings["meeting"])
    reports = [report(folder, rank, beat, now) | {"reaches": reaches} for rank, beat in beats.items() if beat]
    hangs = Path(settings["run"]) / "hangs"
    name = f"attempt{settings['attempt']}-node"
    own = hangs / f"{name}{own_node}.json"
    nodes = {own_node: {"ranks": reports}}
    failure: OSError | None = None
    try:
        within(WRITE_S, lambda: keep_stacks(own.with_suffix(".txt"), reports))
    except OSError as error:  # the file system may be what hangs or is gone: what is known must still be reported
        failure = error
    # Before the other nodes read this one's report: from there on they count on it.
    if are_well_again(reports, living(read_beats(folder, settings["ranks"])), compiled_at):
        say(f"watchdog: silent for {max(item['silent_s'] for item in reports):.0f} s, and well again; see {hangs}")
        return False
    try:
        if failure is None:
            nodes = within(OTHERS_S + WRITE_S, lambda: exchange(own, reports, name, len(hosts)))
    except OSError as error:
        failure = error
    if failure is not None:
        say(f"watchdog: {hangs} cannot be written: {failure}")
    everybody = sorted((item for node in nodes.values() for item in node["ranks"]), key=lambda item: item["rank"])
    silent = [host for node, host in enumerate(hosts) if node not in nodes]
    culprits, why = blame(everybody)
    cause = describe(everybody, culprits, why) + (f"; {', '.join(silent)} gave no report" if silent else "")
    if own_node == min(nodes):
        report_hang(settings, everybody, culprits, cause, hangs)
    descendants = children_of([item["pid"] for item in reports])
    for pid in [*(item["pid"] for item in reports), *descendants]:
        kill(pid, signal.SIGKILL)
    return True


def within(limit_s: float, work: Callable[[], Any]) -> Any:
    """What `work` returns or raises; TimeoutError where that takes longer. It is then left to itself, and may never
    come back from the file system that it waits for."""
    outcome: list[tuple[Any, Exception | None]] = []

    def do() -> None:
        try:
            outcome.append((work(), None))
        except Exception as error:  # whatever it is, it is raised below
            outcome.append((None, error))

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    thread.join(limit_s)
    if not outcome:
        raise TimeoutError(f"no answer within {limit_s:.0f} s")
    value, failure = outcome[0]
    if failure is not None:
        raise failure
    return value


def keep_stacks(path: Path, reports: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(map(text_of, reports)))


def exchange(own: Path, reports: list[dict[str, Any]], name: str, num_nodes: int) -> dict[int, dict[str, Any]]:
    """This node's report for the others', or for those that come in time."""
    write_whole(own, json.dumps({"ranks": reports}))
    return wait_for_others(own.parent, name, num_nodes)


def are_well_again(reports: list[dict[str, Any]], alive: list[dict[str, Any]], compiled_at: float) -> bool:
    """Whether nobody is silent any more. One that was stopped has only run to print its stacks."""
    was_running = all(item["state"] not in ("", "T", "t") for item in reports)
    return was_running and len(alive) == len(reports) and not any(is_silent(beat, compiled_at) for beat in alive)


def report(folder: Path, rank: int, beat: dict[str, Any], now: float) -> dict[str, Any]:
    """What can be said about one rank, its stacks included."""
    state = process_state(beat["pid"], beat["started"])
    stacks = ask_for_stacks(folder / f"rank{rank}.stacks", beat["pid"], state) if state else ""
    return beat | {
        "rank": rank,
        "host": os.uname().nodename,
        "state": state,
        "silent_s": round(now - beat["at"], 1),
        "stacks": stacks,
    }


def reaches_meeting(host: str, port: int) -> bool:
    """Whether this node can still connect to where the ranks met."""
    try:
        with socket.create_connection((host, port), timeout=ANSWER_S):
            return True
    except OSError:
        return False


def ask_for_stacks(path: Path, pid: int, state: str) -> str:
    """Python's stacks of a process. A stopped one is let run for as long as it takes to print them."""
    before = path.stat().st_size if path.exists() else 0
    kill(pid, STACKS_SIGNAL)
    if state == "T":
        kill(pid, signal.SIGCONT)
    deadline, size = time.monotonic() + ANSWER_S, before
    while time.monotonic() < deadline:
        time.sleep(0.05)
        last, size = size, path.stat().st_size if path.exists() else 0
        if size > before and size == last:  # it has stopped growing
            break
    if state == "T":
        kill(pid, signal.SIGSTOP)
    return path.read_text(errors="replace")[before:] if path.exists() else ""


def main_thread(stacks: str) -> list[str]:
    """The frames of the thread that trains, innermost first: the one in which the program began."""
    threads = [block.splitlines() for block in re.split(r"\n\n+", stacks.strip())]
    frames = [[line.strip() for line in block if line.startswith("  File")] for block in threads]
    begun = [block for block in frames if block and block[-1].endswith(("in <module>", "in _run_code", "in _serve"))]
    return (begun or [block for block in frames if block] or [[]])[-1]


def waits_in_collective(stacks: str) -> bool:
    """Whether the training thread's innermost frames are those of a collective."""
    return any(COLLECTIVES.search(frame) for frame in main_thread(stacks)[:INNERMOST])


def blame(ranks: list[dict[str, Any]]) -> tuple[list[int], str]:
    """The ranks that the others wait for, and what is known of them."""
    gone = [item["rank"] for item in ranks if not item["state"]]
    if gone:
        return gone, "its process is gone"
    stopped = [item["rank"] for item in ranks if item["state"] in ("T", "t")]
    if stopped:
        return stopped, "its process is stopped (SIGSTOP or a debugger)"
    cut_off = [item["rank"] for item in ranks if not item.get("reaches", True)]
    if 2 * len(cut_off) > len(ranks):  # the node where all met is the one that is cut off
        return [item["rank"] for item in ranks if item["rank"] not in cut_off], "no other node reaches it"
    if cut_off:
        return cut_off, "its node does not reach the one where the ranks met"
    if len(ranks) == 1:
        return [ranks[0]["rank"]], "it is the only one"
    places = {item["rank"]: (item["step"], order(item["phase"])) for item in ranks}
    last = min(places.values())
    behind = [rank for rank, place in places.items() if place == last]
    if len(behind) < len(ranks):
        return behind, "it is behind the others"
    outside = [item["rank"] for item in ranks if not waits_in_collective(item["stacks"])]
    if outside and len(outside) < len(ranks):
        return outside, "the others wait for it in a collective"
    return [item["rank"] for item in ranks], "all ranks are at the same place"


def order(phase: str) -> int:
    return PHASES.index(phase) if phase in PHASES else 0


def describe(ranks: list[dict[str, Any]], culprits: list[int], why: str) -> str:
    """The hang in one line."""
    suspects = [item for item in ranks if item["rank"] in culprits]
    first = suspects[0]
    frames = main_thread(first["stacks"])
    at = f", at {frames[0].removeprefix('File ')}" if frames else ""
    names = ", ".join(str(rank) for rank in culprits)
    host = ", ".join(sorted({item["host"] for item in suspects}))
    return (
        f"no sign of life for {max(item['silent_s'] for item in ranks):.0f} s: rank {names} on {host} in phase"
        f" {first['phase']!r} after step {first['step']}; {why}{at}"
    )


def report_hang(
    settings: dict[str, Any], ranks: list[dict[str, Any]], culprits: list[int], cause: str, hangs: Path
) -> None:
    """The job's log and incidents.jsonl, by one node for all."""
    say(f"watchdog: {cause}\nwatchdog: the stacks of all ranks, also in {hangs}:")
    say("".join(map(text_of, ranks)).rstrip("\n"))
    first = next(item for item in ranks if item["rank"] in culprits)
    row = {
        "time": round(time.time(), 3),
        "attempt": settings["attempt"],
        "step": first["step"],
        "rank": first["rank"],
        "kind": "hang",
        "shard": "",
        "key": first["phase"],
        "cause": cause,
        "action": f"all ranks ended; {hangs}",
    }
    try:
        within(WRITE_S, lambda: append(Path(settings["run"]) / "incidents.jsonl", json.dumps(row).encode()))
    except OSError as error:
        say(f"watchdog: incidents.jsonl cannot be written: {error}")


def append(path: Path, line: bytes) -> None:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # as jsonl.append_line
    descriptor = os.open(path, flags, 0o644)
    size = os.fstat(descriptor).st_size
    is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
    os.write(descriptor, b"\n" * is_torn + line + b"\n")
    os.close(descriptor)


def say(text: str) -> None:
    """Into the job's log, where that can be written: a closed one must not keep the ranks from being ended, nor one on
    the file system that hangs."""
    try:
        within(ANSWER_S, lambda: print(text, file=sys.stderr, flush=True))
    except (OSError, ValueError):
        return


def text_of(item: dict[str, Any]) -> str:
    """A rank's part of the report."""
    state = item["state"] or "gone"
    head = (
        f"=== rank {item['rank']} on {item['host']}, process {item['pid']} (state {state}): phase {item['phase']!r}"
        f" after step {item['step']}, silent for {item['silent_s']} s"
    )
    return f"{head}\n{item['stacks'] or '(no stacks)'}\n"


def write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def wait_for_others(hangs: Path, name: str, num_nodes: int) -> dict[int, dict[str, Any]]:
    """The reports of all nodes, or of those that came in time."""
    deadline = time.monotonic() + OTHERS_S
    while True:
        files = {int(path.stem.rpartition("node")[2]): path for path in hangs.glob(f"{name}*.json")}
        if len(files) >= num_nodes or time.monotonic() > deadline:
            return {node: json.loads(path.read_text()) for node, path in files.items()}
        time.sleep(0.1)


def children_of(pids: list[int]) -> list[int]:
    """All living descendants, but not this process."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(") ")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], list(pids)
    while waiting:
        for child in parents.get(waiting.pop(), []):
            if child != os.getpid():
                found.append(child)
                waiting.append(child)
    return found


def kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        return


if __name__ == "__main__":
    ending = watch(Path(sys.argv[1]))
    shutil.rmtree(sys.argv[1], ignore_errors=True)  # the ranks are gone, or have closed their files
    os._exit(ending)  # not by way of a thread that may never end
