"""What `amclip submit` checks before sbatch, and the script and command that it leaves in the run's folder."""

import argparse
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amclip_ds import config as settings
from amclip_ds import plugins, preconditions, run_files
from amclip_ds.arguments import plugin_words
from amclip_ds.config import TrainConfig
from amclip_ds.engine.ds_config import read_ds_config, stage_of
from amclip_ds.errors import UserError
from amclip_ds.files import not_written, write_atomically
from amclip_ds.redact import redact, redact_all
from amclip_ds.shards.sources import is_remote
from amclip_ds.sizes import read_size
from amclip_ds.slurm_attempt import check_shards

HOME = Path(__file__).resolve().parent  # its slurm/ is in a checkout a link to the folder at the top
SCRIPTS = HOME / "slurm"
TEMPLATE = SCRIPTS / "train.sbatch"
FIRST_COMMAND = "AMCLIP_HOME=${AMCLIP_HOME:-"  # of the template: lines for sbatch count only before it
SAMPLED_SHARDS = 3
GPU_FLAGS = ("gpus-per-node", "gpus", "gres", "gpus-per-task", "gpus-per-socket")
TASKS = "AMCLIP_TASKS_PER_NODE"
LETTERS = {"gpus": "G", "partition": "p", "dependency": "d", "nodes": "N"}
"""sbatch's flags by their names; some have a letter too"""
WHICH_SLURM = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
"""Variables by which Slurm's commands find and enter a cluster"""


@dataclass
class Plan:
    """A submission: what was found out, and the command that follows from it."""

    config: TrainConfig
    nodes: int
    world_size: int
    chain: int
    command: list[str]
    variables: dict[str, str]
    """What RUN/slurm/train.sbatch sets by itself: under --export=NONE a job gets no environment."""
    found: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """RUN/slurm, where the script and the command are."""
        return Path(self.config.run.out) / "slurm"

    def shell_line(self) -> str:
        """The command as one line of shell."""
        return shlex.join(self.command)

    def lines(self) -> list[str]:
        """What the person who submits should know."""
        lines = [*self.found, f"run folder: {self.config.run.out}", redact(self.shell_line())]
        if self.holds_secrets():
            lines.append(f"the whole command, with its secrets, is in {self.folder}/submit.sh (mode 0600)")
        return lines

    def holds_secrets(self) -> bool:
        return redact(self.shell_line()) != self.shell_line()

    def facts(self) -> dict[str, Any]:
        """The same for a program."""
        return {
            "run": self.config.run.out,
            "nodes": self.nodes,
            "world_size": self.world_size,
            "chain": self.chain,
            "command": redact_all(self.command),
            "environment": self.variables,
            "found": self.found,
        }


def make_plan(args: argparse.Namespace) -> Plan:
    """Checks recipe, batch, memory, a sample of the shards and eval.data; writes RUN/slurm. Raises UserError."""
    config = settings.load(args.recipe, args.overrides, args.plugin)
    shown, asked = given_to_sbatch(args.sbatch, "nodes")
    if asked:
        raise UserError(f"--sbatch: {shown}: give --nodes, by which the rest is checked")
    world_size, per_node, about_gpus = ranks_of(args)
    for name, value in (("--nodes", args.nodes), ("--chain", args.chain), ("tasks per node", per_node)):
        if value < 1:
            raise UserError(f"{name}: {value} is below 1")
    preconditions.check(config, trains_here=False)
    plan = Plan(config, args.nodes, world_size, args.chain, [], {})
    plan.found += [*about_gpus, describe_batch(config, world_size)]
    shards = check_shards(config, args.nodes)
    plan.found.append(sample_shards(shards))
    check_epoch(config, shards)
    settings.check_buildable(config)
    with plugins.blamed():  # both build the model
        check_start(config)
        plan.found.append(check_memory(config, world_size, per_node, args.gpu, args.gpu_memory))
    plan.found += describe_evaluation(config)
    write_script(plan, args)
    return plan


def ranks_of(args: argparse.Namespace) -> tuple[int, int, list[str]]:
    """All ranks, those of a node, and what the person who submits should know about them.

    Where neither args nor what else sbatch is given says a word of GPUs, args.gpus_per_node becomes the partition's.
    """
    if args.tasks_per_node is not None:
        return args.nodes * args.tasks_per_node, args.tasks_per_node, []
    world_size, per_node, found = _ranks_by_gpus(args)
    if tasks := os.environ.get(TASKS):  # train.sbatch heeds it before all else
        if not tasks.isdecimal():
            raise UserError(f"{TASKS}: {tasks!r} is no number of tasks")
        per_node = int(tasks)
        world_size = args.nodes * per_node
        found.append(f"tasks: {per_node} on each node ({TASKS}={tasks})")
    return world_size, per_node, found


def _ranks_by_gpus(args: argparse.Namespace) -> tuple[int, int, list[str]]:
    """The same, a rank for each GPU that is asked for."""
    if args.gpus_per_node is None:
        for name in GPU_FLAGS:
            shown, value = given_to_sbatch(args.sbatch, name)
            if value and (name != "gres" or "gpu" in value):
                return _ranks_by(name, value, shown, args.nodes)
        partition = args.partition or given_to_sbatch(args.sbatch, "partition")[1]
        count = gpus_of_partition(partition or None)
        args.gpus_per_node = str(count) if count else None
    if args.gpus_per_node is None:
        note = "no GPUs asked for: sinfo shows none, or not on every node; --gpus-per-node N asks for them"
        return args.nodes, 1, [note]
    per_node = _gpus_in(f"gpu:{args.gpus_per_node}")
    return args.nodes * per_node, per_node, []


def given_to_sbatch(words: list[str], name: str) -> tuple[str, str]:
    """A flag as sbatch gets it, and its value: by the words for it, else by its variable; empty where by neither."""
    variable, letter = f"SBATCH_{name.upper().replace('-', '_')}", LETTERS.get(name, "")
    shown, value = f"{variable}={os.environ.get(variable, '')}", os.environ.get(variable, "")
    for word, after in itertools.pairwise([*words, ""]):
        if word in (f"--{name}", f"-{letter}"):
            shown, value = f"{word} {after}", after
        elif word.startswith(f"--{name}=") or (letter and re.match(f"-{letter}.", word)):
            shown, value = word, word.removeprefix(f"--{name}=").removeprefix(f"-{letter}")
    return shown, value


def _ranks_by(name: str, value: str, shown: str, nodes: int) -> tuple[int, int, list[str]]:
    """The ranks where a flag of sbatch's own asks for GPUs, one for each."""
    count = _gpus_in(value if name == "gres" else f"gpu:{value}")
    if name in ("gpus-per-node", "gres") and count:
        return nodes * count, count, [f"GPUs: {count} on each node ({shown})"]
    if name == "gpus" and count:
        return count, -(-count // nodes), [f"GPUs: {count} in all ({shown})"]
    return nodes, 1, [f"GPUs: as {shown} has it; the checks here are for one rank on each node"]


def gpus_of_partition(partition: str | None) -> int | None:
    """How many GPUs a node of the partition has, the fewest where they differ; None where Slurm names none.

    partition: None means the default one, or all where Slurm marks none.
    """
    words = ["sinfo", "--noheader", "--format=%P %G"] + ([f"--partition={partition}"] if partition else [])
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [line.split(None, 1) for line in done.stdout.splitlines() if len(line.split(None, 1)) == 2]
    rows = [row for row in rows if row[0].endswith("*")] or rows
    counts = [_gpus_in(gres) for _, gres in rows]
    return min(counts) if counts and all(counts) else None


def _gpus_in(gres: str) -> int:
    """`gpu:a100:4(S:0-1),gpu:2` holds 6, `gpu` and `gpu:a100` one, anything else none."""
    named = re.findall(r"(?:^|,)gpu(?::[^:,()]*[^:,()\d][^:,()]*)?(?::(\d+))?(?![^,(])", gres)
    return sum(int(count or 1) for count in named)


def describe_batch(config: TrainConfig, world_size: int) -> str:
    """The batch arithmetic in words. Raises UserError where it does not divide."""
    share = settings.plan_batch(config.batch, world_size)
    accumulated = f", accumulated over {share.split_in_words}" if share.splits > 1 else ""
    return f"batch: {config.batch.global_size} = {world_size} ranks x {share.local}{accumulated}"


def describe_evaluation(config: TrainConfig) -> list[str]:
    """What eval.data was understood as. Raises UserError."""
    from amclip_ds.data.train_sources import training_shards
    from amclip_ds.evaluate.datasets import check_sets

    return [f"evaluation: {line}" for line in check_sets(config.eval.data, training_shards(config.data))]


def check_memory(
    config: TrainConfig, world_size: int, per_node: int, gpu_name: str | None, gpu_memory: str | None
) -> str:
    """What one rank takes, as `amclip plan` has it, and how long the run is on a known GPU.

    Raises UserError where it cannot fit, with the settings that do.
    """
    from amclip_ds.plan.gpus import Gpu, gpu_of
    from amclip_ds.plan.planner import GIB, Ask, make_plan

    limit = None if gpu_memory is None else read_size(gpu_memory)
    named = None if gpu_name is None else gpu_of(gpu_name)
    limit = limit if limit is not None or named is None else named.memory_gib * GIB
    gpu = Gpu(named.name if named else "GPU", (limit or 1e15) / GIB, None, None)
    plan = make_plan(config, Ask(gpus=world_size, gpu=gpu, gpus_per_node=per_node))
    stage = plan.stages[stage_of(read_ds_config(config.engine))]
    state, peak = sum(stage.memory.state.values()), stage.memory.peak
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in stage.memory.state.items() if size)
    asked = f"--gpu-memory {gpu_memory}" if gpu_memory else f"--gpu {gpu_name}"
    fix = f"take {' '.join(plan.settings)}" if plan.settings else "amclip plan shows what else there is"
    if limit is not None and state > limit:
        raise UserError(
            f"{asked}: the model state alone is {state / 1e9:.1f} GB on each of {world_size} ranks ({listed}); {fix},"
            " a higher ZeRO stage (engine.deepspeed) or more GPUs"
        )
    if limit is not None and peak > limit:
        raise UserError(
            f"{asked}: {peak / 1e9:.1f} GB are needed at the peak on each of {world_size} ranks with batch.per_gpu="
            f"{plan_micro(config, world_size)}; {fix}"
        )
    time = plan.time_of(stage)
    is_known = named is not None and time["hours"] is not None and config.run.steps is not None
    length = f"; {time['hours']:.1f} hours at {time['samples_per_s']:,.0f} samples/s" if is_known else ""
    return (
        f"memory: {state / 1e9:.2f} GB of model state on each rank ({listed}), {peak / 1e9:.2f} GB at the peak"
        f" (planned){length}"
    )


def plan_micro(config: TrainConfig, world_size: int) -> int:
    """Samples whose activations a rank holds at a time."""
    return settings.plan_batch(config.batch, world_size).micro


def sample_shards(shards: list[str]) -> str:
    """Opens the first, the middle and the last shard. Raises UserError naming the one that is no good."""
    from amclip_ds.shards.reader import open_shard
    from amclip_ds.shards.tar import Damage, Member, scan

    sample = sorted({0, len(shards) // 2, len(shards) - 1})[:SAMPLED_SHARDS]
    for path in (shards[index] for index in sample):
        if is_remote(path):
            continue
        try:
            with open_shard(path) as (file, size, *_):
                found = next((item for item in scan(file, size) if isinstance(item, Member | Damage)), None)
        except OSError as error:
            raise UserError(f"data.train: {path}: {error.strerror or error}") from None
        if not isinstance(found, Member):
            raise UserError(f"data.train: {path}: {found.cause if found else 'is empty'}")
    return f"data: {len(shards)} shards, {len(sample)} of them opened (`amclip data check` reads all)"


def check_epoch(config: TrainConfig, shards: list[str]) -> None:
    """Counts samples, in the headers of local shards, until there are enough for a batch. Raises UserError if not, and
    where the account of those shards hides too many images."""
    from amclip_ds.shards.account import account_of
    from amclip_ds.shards.index import scan_shard

    if config.data.resampled or config.data.weights is not None or any(is_remote(path) for path in shards):
        return  # an epoch is then no plain count, or counting is no matter of seconds
    entries = []
    for path in shards:
        entries.append(scan_shard(path).entry)
        if sum(entry.samples for entry in entries) >= config.batch.global_size:
            break
    account = account_of(entries)
    account.check(config.data.max_skip_rate)
    if account.samples >= config.batch.global_size:
        return
    raise UserError(
        f"data.train: an epoch has {account.samples} samples, batch.global_size needs"
        f" {config.batch.global_size}; give more data or a smaller batch"
    )


def check_start(config: TrainConfig) -> None:
    """Whether the weights of model.init_from fit the model. Raises UserError."""
    if not config.model.init_from or preconditions.resumes(config):
        return
    import torch

    from amclip_ds.method import method_of
    from amclip_ds.model import pretrained
    from amclip_ds.model.amclip import AClip
    from amclip_ds.objectives import builder

    with torch.device("meta"):
        model = AClip(config.model, builder(method_of(config).objectives))
    for name, parameter in model.named_parameters():
        pretrained.loaded_tensor(config.model.init_from, name, parameter.shape)


def write_script(plan: Plan, args: argparse.Namespace) -> None:
    """Leaves train.sbatch, config.yaml and submit.sh in RUN/slurm and puts the command into the plan."""
    script = plan.folder / "train.sbatch"
    plan.command = ["sbatch", "--parsable", *sbatch_flags(plan, args), str(script), args.recipe, *args.overrides]
    plan.variables = {"AMCLIP_HOME": str(HOME), "submit_python": sys.executable}
    if tasks := args.tasks_per_node or os.environ.get(TASKS):  # whatever GPUs a variable of sbatch asks for
        plan.variables[TASKS] = str(tasks)
    if plan.chain > 1:
        plan.variables["AMCLIP_CHAIN"] = str(int(time.time()))
    if not any(word.startswith("run.out=") for word in args.overrides):
        plan.command.append(f"run.out={plan.config.run.out}")
    plan.command += plugin_words(args.plugin)
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(script, script_of(plan))
        write_atomically(plan.folder / run_files.CONFIG, settings.dump(plan.config))
        lines = ["#!/bin/bash", f"cd {shlex.quote(str(Path.cwd()))} || exit"]
        if plan.chain > 1:  # it may be run later, and more than once: each time it is another chain
            lines.append(f'sed -i "s/^AMCLIP_CHAIN=.*/AMCLIP_CHAIN=$(date +%s)/" {shlex.quote(str(script))} || exit')
        lines += [plan.shell_line()] * plan.chain
        write_atomically(
            plan.folder / "submit.sh", "\n".join(lines) + "\n", mode=0o600 if plan.holds_secrets() else 0o644
        )
    except OSError as error:
        raise not_written(f"run.out: {plan.folder}", error) from None


def script_of(plan: Plan) -> str:
    """The template, which sets the plan's variables before all else."""
    head, first, rest = TEMPLATE.read_text().partition(FIRST_COMMAND)
    return head + "".join(f"{name}={shlex.quote(value)}\n" for name, value in plan.variables.items()) + first + rest


def copy_scripts(folder: Path) -> list[Path]:
    """Copies the job scripts into a folder, to be edited and given to sbatch. Returns them. Raises UserError."""
    if folder.resolve().name != "slurm":
        raise UserError(
            f"--scripts {folder}: they read AMCLIP_HOME/slurm/environment.sh; as in --scripts {folder}/slurm"
        )
    if folder.exists():
        raise UserError(f"--scripts {folder}: exists; name a folder that does not")
    try:
        shutil.copytree(SCRIPTS, folder)
    except OSError as error:
        raise not_written(f"--scripts {folder}:", error) from None
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sbatch_flags(plan: Plan, args: argparse.Namespace) -> list[str]:
    """sbatch's flags. Chained jobs share a name that is the run's own, since `singleton` goes by name: of its whole
    path, or two chains that were submitted from two folders would wait for each other."""
    name = job_name(plan.config.run.out)
    if plan.chain > 1:
        name += f"-{zlib.crc32(os.path.realpath(plan.config.run.out).encode(errors='surrogateescape')):08x}"
    flags = [f"--job-name={name}", f"--nodes={plan.nodes}"]
    flags += [f"--gpus-per-node={args.gpus_per_node}"] if args.gpus_per_node else []
    flags += [f"--ntasks-per-node={args.tasks_per_node}"] if args.tasks_per_node else []
    flags += [f"--{name}={getattr(args, name)}" for name in ("time", "partition", "account") if getattr(args, name)]
    if plan.chain == 1:
        return flags + args.sbatch
    return [*flags, *args.sbatch, f"--dependency={chained(args.sbatch)}"]  # of two, sbatch heeds the last


def chained(words: list[str]) -> str:
    """The dependency of a chain's jobs, with what the words for sbatch ask for besides. Raises UserError."""
    shown, value = given_to_sbatch(words, "dependency")
    if "?" in value:
        raise UserError(
            f"--chain: {shown}: `?` asks for any one of them, and a chain's jobs would not wait for each other"
        )
    return f"singleton,{value}" if value else "singleton"


def job_name(run: str) -> str:
    """A name for the run's jobs, of characters that squeue shows."""
    path = os.path.relpath(run)
    shown = re.sub(r"[^A-Za-z0-9_.-]+", "-", path).strip("-.")
    is_whole = shown == path.replace("/", "-")
    return f"amclip-{shown}" if is_whole else f"amclip-{shown}-{zlib.crc32(path.encode(errors='surrogateescape')):08x}"


def submit(plan: Plan, jobs: list[int]) -> None:
    """Submits the plan's job, or its chain of jobs, and appends each one's id to `jobs`.

    Raises UserError with sbatch's own words, which names the jobs submitted before: they stay in the queue.
    """
    if shutil.which("sbatch") is None:
        raise UserError(f"sbatch is not here: submit on a login node; {plan.folder}/submit.sh is ready")
    for _ in range(plan.chain):
        done = subprocess.run(plan.command, capture_output=True, text=True, env=_environment_of_sbatch())
        ids = [str(job) for job in jobs]
        cancel = f"scancel {' '.join(ids)}, or leave them: each continues the run"
        before = f"; submitted before it: {', '.join(ids)} ({cancel})" if jobs else ""
        if done.returncode:
            raise UserError(f"sbatch: {' '.join(done.stderr.split()) or done.returncode}{before}")
        answer = re.search(r"^(\d+)(;.*)?$", done.stdout, re.M)  # a site's wrapper may print more
        if answer is None:
            said = " ".join(done.stdout.split()) or "it printed nothing"
            raise UserError(f"sbatch names no job ({said}); squeue --me shows what it queued{before}")
        jobs.append(int(answer[1]))


def _environment_of_sbatch() -> dict[str, str]:
    """This environment; within a job (salloc) without that job's SLURM_*, which sbatch would hand to the new one."""
    if "SLURM_JOB_ID" not in os.environ:
        return dict(os.environ)
    return {name: value for name, value in os.environ.items() if name[:6] != "SLURM_" or name in WHICH_SLURM}


if __name__ == "__main__":
    print(
        "python -m amclip_ds.submit runs nothing; type: python -m amclip_ds submit (or amclip submit)", file=sys.stderr
    )
    sys.exit(2)
