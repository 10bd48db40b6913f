"""The files of a run's folder by name, and what each row of them has: written and read by these alone. Loads no torch.

rows, unreadable = jsonl.read(run / run_files.METRICS, run_files.STEP, run_files.MAX_METRICS)
"""

CHECKPOINTS = "checkpoints"
"""the folder of checkpoints"""
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


STEPPED = (METRICS, SAMPLE_IDS, EVALUATIONS, CLASSES, MASKS)
"""those whose rows a resume sets aside where it writes their steps again"""

STEP: dict[str, type] = {"step": int}
"""What every row of metrics.jsonl, eval.jsonl and sample_ids.jsonl has."""
EVALUATION: dict[str, type] = STEP | {"weights": str, "dataset": str, "task": str, "metrics": dict}
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
