"""The files of a run's folder by name, and what each row of them has: written and read by these alone. Loads no torch.

rows, unreadable = jsonl.read(run / run_files.METRICS, run_files.STEP, run_files.MAX_METRICS)
"""

from pathlib import Path

from amclip_ds.errors import UserError

CHECKPOINTS = "checkpoints"
"""the folder of checkpoints"""
MANIFEST = "manifest.json"
"""what a checkpoint's folder holds, whatever its name"""
CONFIG = "config.yaml"
VERSIONS = "versions.json"
ATTEMPTS = "attempts.jsonl"
"""a row a start; RUN/slurm has one of this name, a row an attempt of a job"""
METRICS = "metrics.jsonl"
SAMPLE_IDS = "sample_ids.jsonl"
EVALUATIONS = "eval.jsonl"
CLASSES = "eval_classes.jsonl"
INCIDENTS = "incidents.jsonl"
TIMELINE = "timeline.jsonl"
LOG = "out.log"
PLAN = "plan.json"
"""what was planned of memory and speed, and what was measured"""
CHANGES = "changes.diff"
"""what differed from the git revision that versions.json names"""
PICTURES = "pictures"
"""the folder of what the masks keep: samples.json, MASKS, images"""
MASKS = "pictures/masks.jsonl"
DATA = "data.json"
"""of a capsule alone: the hashes of the run's data"""
OWNER = "owner.json"
VERDICT = "exit.json"
REPORT = "report.html"
STOP = "STOP"
"""a person's wish that the run saves and stops"""


def copy_of(plugin: str, its_hash: str) -> str:
    """The copy of a plug-in's file, for whoever wants to know what the run did; nothing ever imports it."""
    return f"plugin-{plugin}-{its_hash[:12]}.py.txt"


def runs_near(folder: Path) -> list[Path]:
    """The runs' folders in a folder, or the one whose checkpoints it holds: what its name may have been meant to be."""
    path = folder.absolute()
    around = [above.parent for above in (path, path.parent) if above.name == CHECKPOINTS]
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}") if path.parent.name != "slurm")
    return [run for run in around if (run / CONFIG).is_file()] or inside


def check_is_run(folder: Path, or_what: str = "") -> None:
    """Raises UserError for what is no run's folder, which names the run that may have been meant: a checkpoint has a
    config.yaml too, and what is written beside it would be written into the checkpoint."""
    if not folder.exists():
        raise UserError(f"{folder}: missing")
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder}: a checkpoint; name its run" + "".join(f", {run}" for run in runs_near(folder)))
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: not a run's folder{or_what}: it has no {CONFIG}{near_miss(folder)}")


def near_miss(folder: Path) -> str:
    """What to add to the name of a folder that is not what was asked for: the first of `runs_near`."""
    near = runs_near(folder)
    others = f" (and {len(near) - 1} more)" if len(near) > 1 else ""
    return f"; a run is {near[0]}{others}" if near else ""


STEPPED = (METRICS, SAMPLE_IDS, EVALUATIONS, CLASSES, MASKS)
"""those whose rows a resume sets aside where it writes their steps again"""

STEP: dict[str, type] = {"step": int}
"""What every row of metrics.jsonl, eval.jsonl and sample_ids.jsonl has."""
EVALUATION: dict[str, type] = STEP | {"weights": str, "dataset": str, "task": str, "metrics": dict}
PROBES = ("linear_probe", "knn")
"""Tasks of rows that `amclip eval` alone makes: a classifier learnt on the features, whose accuracy has the name of a
zero-shot one and is another number."""
OF_CLASSES: dict[str, type] = STEP | {"weights": str, "dataset": str, "task": str, "per_class": dict}
INCIDENT: dict[str, type] = STEP | {"kind": str, "cause": str, "attempt": int}
OF_A_BATCH = LOSS_SPIKE, NON_FINITE_LOSS, NON_FINITE_GRADIENT = "loss_spike", "non_finite_loss", "non_finite_gradient"
"""Kinds of incidents that are of a step's whole batch: `amclip samples RUN STEP` shows it."""
EVENT: dict[str, type] = STEP | {"event": str, "attempt": int}
"""of timeline.jsonl"""
KEPT: dict[str, type] = STEP | {"kept": list}
"""of pictures/masks.jsonl"""
JOB_ATTEMPT: dict[str, type] = STEP | {"job": str, "verdict_time": int}
"""of slurm/attempts.jsonl"""
MAX_METRICS = 1 << 30
"""bytes of metrics.jsonl, of a million steps"""
