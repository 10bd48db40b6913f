"""What happened to a run, in order: starts, saves, evaluations, incidents, ends; each with its cause and effect."""

import shlex
from dataclasses import dataclass

from amclip_ds import run_files
from amclip_ds.errors import DONE, FAULT, INTERRUPTED, MISTAKE, STOPPED_ITSELF, TO_REQUEUE
from amclip_ds.report.incidents import cause_of, effect_of
from amclip_ds.report.read import RunFacts, number_in
from amclip_ds.report.time_spent import Attempt

WORST = 10  # samples by their loss, of a step whose loss is the incident
START, SAVE, EVALUATION, INCIDENT, END = "start", "save", "evaluation", "incident", "end"
KINDS = {
    START: "starts and resumes",
    SAVE: "checkpoints",
    EVALUATION: "evaluations",
    INCIDENT: "incidents",
    END: "ends",
}
MEANING = {
    DONE: "done",
    FAULT: "a fault of amclip or of the machine",
    MISTAKE: "a mistake in the command, the settings or the data",
    STOPPED_ITSELF: "the run stopped itself (guards, data limits)",
    TO_REQUEUE: "stopped from outside after a committed checkpoint; the same command resumes",
    INTERRUPTED: "interrupted before there was anything to save",
}


@dataclass
class Event:
    """Something at a time and a step."""

    time: float
    """seconds since the epoch; 0: unknown"""
    step: int
    attempt: int
    kind: str
    what: str
    cause: str = ""
    effect: str = ""
    until: int = 0
    """the last step of several alike; else the step"""
    count: int = 1
    command: str = ""
    """shows the samples of the step"""


def events_of(run: RunFacts, attempts: list[Attempt]) -> list[Event]:
    """Everything, in the order of the clock."""
    found = [*_starts(run, attempts), *_waits(run), *_incidents(run), *_ends(run, attempts)]
    return sorted(found, key=lambda event: (event.attempt, event.time, event.step))


def in_words(kind: str) -> str:
    """An incident's kind as people write it."""
    return kind.replace("_", " ")


def describe_verdict(run: RunFacts, attempts: list[Attempt]) -> tuple[str, str, bool]:
    """(one line, the reason, whether all is well): the state of the run."""
    length = f" of {run.total_steps}" if run.total_steps else ""
    if run.verdict is not None:
        code = run.verdict["code"]
        meaning = MEANING.get(code, f"ended by its launcher with code {code}")
        word = "Done" if code == DONE else meaning[0].upper() + meaning[1:]
        return (
            f"{word}, after step {run.last_step}{length} (exit code {code})",
            str(run.verdict.get("reason", "")),
            (code in (DONE, TO_REQUEUE)),
        )
    if run.is_alive:
        return f"At work: step {run.last_step}{length}", "it wrote something in the last minutes", True
    if not run.starts and not attempts:
        return "Not started", "the folder holds settings alone", True
    return (
        f"Ended without a verdict, after step {run.last_step}{length}",
        "no exit.json: the processes were killed, or their machine went away; the last lines of the job's output say"
        " more, and the same command resumes from the newest checkpoint",
        False,
    )


def _starts(run: RunFacts, attempts: list[Attempt]) -> list[Event]:
    found = []
    facts = {row["attempt"]: row for row in run.timeline if row["event"] == "start"}
    resumed = {row["attempt"]: row for row in run.timeline if row["event"] == "resumed"}
    for before, attempt in zip([None, *attempts], attempts):
        row, saved = facts.get(attempt.number, {}), resumed.get(attempt.number)
        ranks, nodes = row.get("world_size"), row.get("num_nodes")
        where = f" on {ranks} ranks, {nodes} node(s), {row.get('device')}, {row.get('engine')}" if ranks else ""
        job = f", Slurm job {row['job']}, restart {row.get('restart')}" if row.get("job") else ""
        effect = []
        if saved:
            effect.append(f"resumes from step {saved['step']}")
            if before and before.last_step > saved["step"]:
                effect.append(f"steps {saved['step'] + 1} to {before.last_step} are made again")
            if ranks and saved.get("world_size") not in (None, ranks):
                effect.append(
                    f"the world changes from {saved['world_size']} to {ranks} ranks; batch and order of samples stay"
                )
        elif before:
            effect.append("begins anew: there was no checkpoint" if attempt.last_step else "came to no step")
        cause = f"attempt {before.number} had ended" + (f": {before.reason}" if before.reason else "") if before else ""
        found.append(
            Event(
                attempt.began,
                attempt.first_step,
                attempt.number,
                START,
                f"attempt {attempt.number} starts{where}{job}",
                cause,
                "; ".join(effect),
            )
        )
    return found


def _waits(run: RunFacts) -> list[Event]:
    """Saves and evaluations: a row each, however many waits they consisted of; a commit, at whatever step it comes, is
    of the attempt's save before it."""
    sums: dict[tuple[int, int, str], Event] = {}
    seconds: dict[tuple[int, int, str], float] = {}
    saved: dict[int, tuple[int, int, str]] = {}
    for row in run.timeline:
        kind = {"save": SAVE, "commit": SAVE, "evaluate": EVALUATION}.get(row["event"])
        if kind is None:
            continue
        key = (row["attempt"], row["step"], kind)
        if row["event"] == "commit":
            if row["attempt"] not in saved:  # its own wait was too short for a row
                continue
            key = saved[row["attempt"]]
        elif kind == SAVE:
            saved[row["attempt"]] = key
        seconds[key] = seconds.get(key, 0.0) + number_in(row, "seconds")
        what = "checkpoint" if kind == SAVE else "evaluation"
        sums.setdefault(key, Event(number_in(row, "time"), row["step"], row["attempt"], kind, what))
    for key, event in sums.items():
        event.effect = f"training waited {seconds[key]:.1f} s"
    return list(sums.values())


def _incidents(run: RunFacts) -> list[Event]:
    """Those that are alike are one; of samples the first is the example."""
    found = []
    for held in run.incidents.alike.values():
        row, cause, command = held.first, cause_of(held.first), ""
        if row["kind"] in run_files.OF_A_BATCH:
            command = shlex.join(["amclip", "samples", str(run.folder), str(row["step"]), "--worst", str(WORST)])
        if row.get("shard"):
            cause = f"{cause}: {row.get('key', '')} in {row['shard']}"
        found.append(
            Event(
                number_in(row, "time"),
                row["step"],
                row["attempt"],
                INCIDENT,
                in_words(row["kind"]),
                cause,
                effect_of(row),
                held.until,
                held.count,
                command,
            )
        )
    return found


def _ends(run: RunFacts, attempts: list[Attempt]) -> list[Event]:
    found = []
    for attempt in attempts:
        if attempt.code is not None:
            found.append(
                Event(
                    attempt.ended,
                    attempt.last_step,
                    attempt.number,
                    END,
                    f"attempt {attempt.number} ends with code {attempt.code}",
                    attempt.reason,
                    MEANING.get(attempt.code, ""),
                )
            )
        elif attempt is not attempts[-1] or (run.verdict is None and not run.is_alive):
            found.append(
                Event(
                    attempt.ended,
                    attempt.last_step,
                    attempt.number,
                    END,
                    f"attempt {attempt.number} ends without a word",
                    "killed, or its machine went away",
                    "what was behind the newest checkpoint is made again",
                )
            )
    return found


@dataclass
class Loss:
    """Samples of one shard and kind that could not be used."""

    shard: str
    kind: str
    count: int
    example: str
    """key and cause of the first"""
    effect: str


def lost_samples(run: RunFacts) -> list[Loss]:
    """The ledger: by shard and kind, the worst first."""
    worst = sorted(run.incidents.lost.items(), key=lambda item: -item[1].count)
    return [
        Loss(shard, kind, held.count, f"{held.first.get('key', '')}: {held.first['cause']}", effect_of(held.first))
        for (shard, kind), held in worst
    ]
