"""What slurm/train.sbatch asks around one attempt of a job: may it begin, and what follows from how it ended?

`python -m amclip_ds.slurm_attempt begin ...` checks what can be checked on one node, describes the attempt in the log
(standard error) and prints the run's folder, a free port and the resume mode, or `exit CODE` where the job is over;
`... end ...` reads RUN/exit.json and prints `requeue WHY` or `exit CODE`. Attempts are remembered in
RUN/slurm/attempts.jsonl: three in a row (--max-stalls) that bring no new checkpoint end the job, whatever ended them.
"""

import argparse
import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amclip_ds import preconditions, run_files
from amclip_ds.arguments import Parser, add_training
from amclip_ds.checkpoint.step_folders import list_steps
from amclip_ds.display import printable
from amclip_ds.errors import FAULT, MISTAKE, STOPPED_ITSELF, TO_REQUEUE, AmclipError, UserError
from amclip_ds.files import not_written, outlasting, write_atomically
from amclip_ds.jsonl import append_line, read_lines
from amclip_ds.ranks.launcher_env import free_port
from amclip_ds.record import is_by_file, read_verdict
from amclip_ds.redact import redact


@dataclass(frozen=True)
class Decision:
    """What the batch script does next: requeue, or exit with `code`."""

    requeue: bool
    code: int
    reason: str


@dataclass(frozen=True)
class Limits:
    """How often a job may restart."""

    max_restarts: int
    max_stalls: int
    retry_crashes: bool = False


@dataclass(frozen=True)
class Newest:
    """The newest committed checkpoint of a run. Another run's in the same folder may have its step, not its time."""

    step: int = -1
    """-1: there is none."""
    written: int = 0
    """When its manifest was written, in ns; 0 if that is not known."""

    def is_of(self, attempt: dict[str, Any]) -> bool:
        """Whether it was the newest already as an attempt began."""
        return self.step == attempt["step"] and self.written == attempt.get("checkpoint_time", self.written)

    def is_newer_than(self, attempt: dict[str, Any]) -> bool:
        """Whether it was written since an attempt began. A start that sets others aside leaves an older one newest."""
        before = attempt.get("checkpoint_time")
        return self.written > before if type(before) is int else self.step > attempt["step"]


def newest_checkpoint(run: Path) -> Newest:
    for step, path in reversed(list_steps(run / run_files.CHECKPOINTS)):
        return Newest(step, time_of(path / run_files.MANIFEST))
    return Newest()


def time_of(file: Path) -> int:
    """When it was written, in ns; 0 if it is not there."""
    with contextlib.suppress(OSError):
        return file.stat().st_mtime_ns
    return 0


def verdict_time(run: Path) -> int:
    """When RUN/exit.json was written, in ns; 0 if there is none. An older verdict has another."""
    return time_of(run / run_files.VERDICT)


def resume_mode(wanted: str, mine: list[dict[str, Any]], newest: Newest, chain_since: int | None = None) -> str:
    """`--resume never` and `--resume PATH` hold until the job, or a chain's job before it, has saved: then its starts
    continue from that. chain_since: when the chain was submitted, in ns (see the function of that name)."""
    has_saved = mine and (mine[-1].get("resume") == "auto" or newest.is_newer_than(mine[0]))
    is_continued = chain_since is not None and newest.written > chain_since
    return "auto" if has_saved or is_continued else wanted


def chain_since(args: argparse.Namespace, mine: list[dict[str, Any]]) -> int:
    """When the chain was submitted, in ns.

    Slurm counts a requeue as another time. A job that was requeued before it could begin does not know the first one:
    it takes what is there for its chain's, which loses nothing.
    """
    is_requeued = args.restart > 0 and not mine
    return (args.submitted or (0 if is_requeued else args.queued)) * 10**9


def count_stalls(mine: list[dict[str, Any]], newest: Newest) -> int:
    """How many of the job's last attempts brought no new checkpoint."""
    stalls = 0
    for attempt in reversed(mine):
        if not newest.is_of(attempt):
            break
        stalls += 1
    return stalls


def decide(verdict: dict[str, Any] | None, restarts: int, stalls: int, limits: Limits, status: int) -> Decision:
    """What follows from an attempt. `verdict` None: it wrote none; `status` is srun's.

    A fault (code 1) of rank 0 is a crash as that of any other rank, which leaves no verdict. But where no rank failed
    (status 0), all of them left before the first step because they were asked to stop: see SignalListener.
    """
    if verdict is not None and verdict["code"] not in (TO_REQUEUE, FAULT):
        return Decision(False, verdict["code"], f"{verdict.get('reason', '')} (step {verdict.get('step')})")
    is_stopped = status == 0 or (verdict is not None and verdict["code"] == TO_REQUEUE)
    what = "stopped" if is_stopped else f"crash (srun: {status})"
    if verdict is not None:
        what += f" at step {verdict.get('step')}: {verdict.get('reason', '')}"
    elif is_stopped:
        what += " before the first step"
    if verdict is not None and is_by_file(verdict):
        return Decision(False, TO_REQUEUE, f"{what}; submit again to continue")
    if verdict is None and status in (MISTAKE, STOPPED_ITSELF):  # another trainer has the folder, and its verdict
        return Decision(False, status, f"the ranks ended with code {status}; the lines above say why")
    failed = TO_REQUEUE if is_stopped else (status if 0 < status < 128 else FAULT)
    if not is_stopped and not limits.retry_crashes:
        return Decision(False, failed, f"{what}; the lines above name the rank (AMCLIP_RETRY_CRASHES=1 would requeue)")
    if stalls >= limits.max_stalls:
        return Decision(False, failed, f"{what}; no new checkpoint in {stalls} attempts (AMCLIP_MAX_STALLS)")
    if restarts >= limits.max_restarts:
        return Decision(False, failed, f"{what}; restarted {restarts} times (AMCLIP_MAX_RESTARTS)")
    return Decision(True, failed, what)


def begin(args: argparse.Namespace) -> str:
    """Checks, remembers and describes an attempt.

    Returns, a line each: the run's folder, a port, the resume mode, the nodes to use, and the range of nodes
    that the job accepts for its next start (empty where that is what it asks for already).
    """
    from amclip_ds import config as settings
    from amclip_ds.run_folder import git_revision

    train_parser = Parser(prog="train.sbatch", usage="train.sbatch RECIPE key=value ...")
    add_training(train_parser)
    wanted = train_parser.parse_intermixed_args(args.train_arguments)
    config = settings.load(wanted.recipe, wanted.overrides, wanted.plugin)
    run = Path(config.run.out)
    nodes = args.nodes
    if args.restart and args.tasks_per_node:  # fewer nodes than the user chose: whatever number of them can train
        nodes = largest_that_divides(config.batch.global_size, args.nodes, args.tasks_per_node) or args.nodes
        args.tasks = nodes * args.tasks_per_node
    settings.plan_batch(config.batch, args.tasks)
    folder = run / "slurm"
    preconditions.check_folder(run)
    earlier, newest = read_lines(folder / run_files.ATTEMPTS, run_files.JOB_ATTEMPT), newest_checkpoint(run)
    mine = [row for row in earlier if row["job"] == args.job]
    since = chain_since(args, mine) if args.chain else None
    resume = resume_mode(wanted.resume, mine, newest, since)
    preconditions.check(config, resume)
    check_shards(config, nodes)
    revision = git_revision()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        append_line(
            folder / run_files.ATTEMPTS,
            {
                "time": round(time.time(), 3),
                "job": args.job,
                "restart": args.restart,
                "nodes": args.node_list,
                "num_nodes": args.nodes,
                "tasks": args.tasks,
                "step": newest.step,
                "checkpoint_time": newest.written,
                "resume": resume,
                "revision": revision,
                "verdict_time": verdict_time(run),
                "command": ["amclip", "train", *args.train_arguments],
            },
        )
        write_atomically(folder / f"config-{args.job}-{args.restart}.yaml", settings.dump(config))
    except OSError as error:
        raise not_written(f"run.out: {run}", error) from None
    _check_restarts(mine, args, newest)
    if since is not None and verdict_time(run) > since:
        _chain_check(read_verdict(run), run)
    describe(args, run, resume, newest.step, revision, earlier)
    if nodes < args.nodes:
        _say(
            f"note: {args.nodes - nodes} node(s) idle: {config.batch.global_size} samples divide by {args.tasks} tasks"
        )
    most = max(args.nodes, 1, *(row["num_nodes"] for row in mine if type(row.get("num_nodes")) is int))
    return f"{run}\n{free_port()}\n{resume}\n{nodes}\n{node_range(args.min_nodes, most)}"


def largest_that_divides(global_size: int, nodes: int, tasks_per_node: int) -> int:
    """The most nodes, `nodes` at most, over whose tasks the global batch divides; 0 if not even one node's do."""
    return max((n for n in range(1, nodes + 1) if global_size % (n * tasks_per_node) == 0), default=0)


def node_range(min_nodes: int, most: int) -> str:
    """`MIN-MAX`, the nodes that a requeued job accepts; empty where that is what it asks for already.

    most: the nodes of the job's largest attempt. While a job runs on fewer, Slurm shows those as its most: a job that
    believed it would never grow back.
    """
    least = min(max(min_nodes, 1), most)
    return "" if least == most else f"{least}-{most}"


def end(args: argparse.Namespace) -> str:
    """The decision about an attempt that is over: `requeue WHY` or `exit CODE`."""
    run = Path(args.run)
    log = run / "slurm" / run_files.ATTEMPTS
    # What was saved to be requeued must not end here, of a file system's bad moment
    attempts = outlasting(str(log), lambda: read_lines(log, run_files.JOB_ATTEMPT))
    mine = [row for row in attempts if row["job"] == args.job]
    verdict = read_verdict(run)
    if mine and verdict_time(run) == mine[-1]["verdict_time"]:
        verdict = None  # left by an earlier attempt: this one wrote nothing
    stalls = count_stalls(mine, newest_checkpoint(run))
    limits = Limits(args.max_restarts, args.max_stalls, args.retry_crashes)
    decision = decide(verdict, args.restart, stalls, limits, args.status)
    reported = f"code {verdict['code']} in {run}/exit.json" if verdict else f"no verdict in {run}/exit.json"
    _say(f"attempt over: {reported}: {decision.reason}")
    return f"requeue {decision.reason}" if decision.requeue else f"exit {decision.code}"


def check_shards(config: Any, num_nodes: int) -> list[str]:
    """Every shard is there and every node has one to read. Returns them. Raises UserError."""
    from amclip_ds.data.train_sources import training_sources

    shards = [shard for shards in training_sources(config.data) for shard in shards]
    if len(shards) < num_nodes:
        raise UserError(
            f"data.train: {len(shards)} shard(s) for {num_nodes} nodes; take at most {len(shards)} node(s), or cut the"
            f" data into more shards"
        )
    return shards


def describe(
    args: argparse.Namespace, run: Path, resume: str, step: int, revision: str | None, earlier: list[dict[str, Any]]
) -> None:
    """The head of an attempt in the job's log."""
    is_fresh = resume == "never" or (resume == "auto" and step < 0)
    begins = "starts fresh" if is_fresh else f"resumes from {f'step {step}' if resume == 'auto' else resume}"
    _say(f"job {args.job}, restart {args.restart}: {args.tasks} task(s) on {args.nodes} node(s): {args.node_list}")
    _say(f"run {run.resolve()}; {begins}; code {revision}")
    before = earlier[-1] if earlier else {}
    if before and before.get("revision") != revision:
        _say(f"note: the code changed since the last attempt, {before.get('revision')} -> {revision}")
    if before.get("tasks", args.tasks) != args.tasks:
        _say(f"note: {before['tasks']} task(s) before, {args.tasks} now; the global batch stays")
    _say(f"watch: tail -f {run}/out.log")
    _say(f"save and stop: touch {run}/STOP; save and requeue: scancel --batch --signal=USR1 {args.job}")


def _check_restarts(mine: list[dict[str, Any]], args: argparse.Namespace, newest: Newest) -> None:
    """Slurm requeues a job of a lost node by itself, without asking `end`: the limits hold at the start too."""
    stalls = count_stalls(mine, newest)
    if args.restart > args.max_restarts:
        raise JobEnded(f"restarted {args.restart} times: given up (AMCLIP_MAX_RESTARTS)")
    if stalls >= args.max_stalls:
        raise JobEnded(f"no new checkpoint in {stalls} attempts: given up (AMCLIP_MAX_STALLS)")


def _chain_check(verdict: dict[str, Any] | None, run: Path) -> None:
    """A later job of a chain has nothing to do once an earlier one ended the run for good, or a person stopped it."""
    if verdict and (verdict["code"] in (MISTAKE, STOPPED_ITSELF) or is_by_file(verdict)):
        why = f": {verdict['reason']}; submit again to continue" if is_by_file(verdict) else ""
        ending = JobEnded(f"{run}/exit.json: an earlier job of this chain ended with code {verdict['code']}{why}")
        ending.exit_code = verdict["code"]
        raise ending


class JobEnded(AmclipError):
    """The job is over, and another start of it would change nothing: its code is the job's."""


def _say(text: str) -> None:
    print(printable(f"train.sbatch: {redact(text)}"), file=sys.stderr, flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False, prog="slurm_attempt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("begin", begin), ("end", end)):
        sub = commands.add_parser(name, allow_abbrev=False)
        sub.set_defaults(function=function)
        sub.add_argument("--job", required=True)
        sub.add_argument("--restart", type=int, default=0)
        sub.add_argument("--max-restarts", type=int, default=100)
        sub.add_argument("--max-stalls", type=int, default=3)
        if name == "begin":
            sub.add_argument("--nodes", type=int, required=True)
            sub.add_argument("--tasks", type=int, required=True)
            sub.add_argument("--tasks-per-node", type=int)
            sub.add_argument("--min-nodes", type=int, default=1)
            sub.add_argument("--node-list", default="")
            sub.add_argument("--chain", action="store_true")
            for flag in ("--submitted", "--queued"):  # in seconds; squeue may not have answered
                sub.add_argument(flag, type=lambda text: int(text) if text.isdecimal() else 0, default=0)
            sub.add_argument("train_arguments", nargs="+")
        else:
            sub.add_argument("--run", required=True)
            sub.add_argument("--status", type=int, required=True)
            sub.add_argument("--retry-crashes", type=lambda text: text not in ("", "0"), default=False)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the batch script reads the answer: no library may print into it
            answer = args.function(args)
        print(answer)
        return 0
    except AmclipError as error:
        _say(str(error))
        if isinstance(error, JobEnded):
            print(f"exit {error.exit_code}")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
