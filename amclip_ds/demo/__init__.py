"""`amclip demo`: synthetic shards -> a tiny A-CLIP, and its control with random masks, trained by DeepSpeed ->
accuracies, pictures, OUT/demo.json."""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from amclip_ds import config as settings
from amclip_ds import run_files
from amclip_ds.checkpoint import drift
from amclip_ds.data import synthetic
from amclip_ds.demo import picture, scenes
from amclip_ds.display import duration
from amclip_ds.errors import UserError
from amclip_ds.evaluate.encoder import TowerEncoder
from amclip_ds.files import not_written, write_atomically
from amclip_ds.jsonl import left_out, read, read_lines
from amclip_ds.launch import run_ranks
from amclip_ds.model.text import TextTower
from amclip_ds.model.vision import VisionTower

TEST_SCENES = 2048
NUM_SCENES = 512  # scenes over which the kept share of the object is averaged
SEED = 0
CONTROL = "random2x-tiny"
SETTINGS = {
    "aclip-tiny": ["loss.o2o_weight=0", "loss.o2e_weight=0"],  # they cost accuracy at this scale: docs/results/demo.md
    CONTROL: [],
}
REPORT_EVERY_S = 30.0


def demo(out: Path, steps: int, num_scenes: int, procs: int | None, seed: int, setup_seconds: float) -> int:
    """Runs the whole path and prints what came of it; the scenes do not depend on the seed. Returns the exit code."""
    start = time.monotonic()
    claim(out)
    shards, run, control = out / "scenes", out / "run", out / "random"
    if not (shards / "test").is_dir():
        print(f"1/5  making {num_scenes} training and {TEST_SCENES} held-out scenes in {shards}")
        synthetic.write_dataset(shards, num_train=num_scenes, num_test=TEST_SCENES, image_size=64, seed=SEED)
    procs = procs or max(1, torch.cuda.device_count())  # on a CPU one: two would spend a fifth of a step on gloo
    about = duration(steps * seconds_of_step(procs))
    where = f"{procs} process{'es' * (procs > 1)}"
    print(f"2/5  training aclip-tiny without its further losses, {steps} steps, {where}, fp32: about {about}")
    code, train_seconds = trained("aclip-tiny", shards, run, steps, procs, seed)
    if code:
        return code
    print(f"3/5  training {CONTROL}, its control: the same scenes and steps, tokens removed at random")
    code, control_seconds = trained(CONTROL, shards, control, steps, procs, seed)
    if code:
        return code
    print("4/5  measuring what the masks keep")
    config, student, teacher = scenes.load_modules(run)
    masked = scenes.mask_scenes(config, teacher, shards / "test", num_scenes=NUM_SCENES)
    encoder = TowerEncoder(
        student, "student", config.model.vision.image_size, config.model.text.context_length, torch.device("cpu")
    )
    print("5/5  drawing")
    picture.draw_masks(masked, out / "masks.png")
    picture.draw_curves(run, out / "curves.png", control)
    colour, shape = scenes.part_accuracies(encoder, shards)
    result = final_accuracies(run) | {
        "classes": len(synthetic.CLASSES),
        "acc1_colour": colour,
        "acc1_shape": shape,
        "object_kept_attentive": masked.object_kept("attentive"),
        "object_kept_random": masked.object_kept("random"),
        "seconds": time.monotonic() - start + setup_seconds,
        "setup_seconds": setup_seconds,
        "acc1_random": final_accuracies(control)["acc1_student"],
        "control_seconds": control_seconds,
        "train_seconds": train_seconds,
        "steps": steps,
        "seed": seed,
        "procs": procs,
        "precision": drift.precision_of(config.engine.deepspeed),
        "run": str(run),
        "control": str(control),
    }
    write_atomically(out / "demo.json", json.dumps(result, indent=1) + "\n")
    print_summary(out, result)
    return 0


def claim(out: Path) -> None:
    """Takes the folder over: an earlier demo's run is removed, anything else of the user's is left and refused."""
    if out.exists() and any(out.iterdir()) and not (out / ".amclip-demo").exists():
        raise UserError(f"--out {out}: the folder holds something else; name an empty or new one")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".amclip-demo").touch()
    except OSError as error:
        raise not_written(f"--out {out}:", error) from None
    for name in ("run", "random"):
        shutil.rmtree(out / name, ignore_errors=True)


def trained(recipe: str, shards: Path, run: Path, steps: int, procs: int, seed: int) -> tuple[int, float]:
    """Trains a recipe on the scenes: the exit code, and the seconds it took."""
    began = time.monotonic()
    with printed_progress(run, steps):
        code = run_ranks(train_command(recipe, shards, run, steps, seed), procs, str(run), listens=True)
    return code, time.monotonic() - began


def train_command(recipe: str, shards: Path, run: Path, steps: int, seed: int) -> list[str]:
    """The command a user would type. The scenes are named by colour, which hue, greyscale and solarize take away.

    In fp32, the tiny recipes' own: bf16 was no faster where a CPU has its units (docs/results/demo.md).
    """
    return [
        sys.executable,
        "-m",
        "amclip_ds",
        "train",
        recipe,
        f"data.train={shards}/train",
        f"run.out={run}",
        f"run.steps={steps}",
        f"run.seed={seed}",
        f"eval.data={shards}",
        f"eval.every_steps={max(25, steps // 4)}",
        "data.keep_colours=true",
        *SETTINGS[recipe],
        "--resume",
        "never",
    ]


def seconds_of_step(procs: int) -> float:
    """A rough step of the demo here and now: both towers, forward and backward, over one rank's share; data, teacher,
    heads and optimizer take about as much again."""
    config = settings.load("aclip-tiny")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // procs))  # as the ranks will have
    vision, text = VisionTower(config.model.vision).to(device), TextTower(config.model.text).to(device)
    size, views = config.model.vision.image_size, config.data.num_views
    samples = max(2, config.batch.global_size // procs)
    images = torch.zeros(views * samples, 3, size, size, device=device)
    words = torch.full((samples, 16), config.model.text.eos_token_id, device=device)
    times = []
    for _ in range(2):
        began = time.perf_counter()
        (vision(images).cls.sum() + text(words).sum()).backward()
        times.append(time.perf_counter() - began)
    torch.set_num_threads(before)
    return 2 * min(times)


@contextmanager
def printed_progress(run: Path, steps: int) -> Iterator[None]:
    """Where no terminal shows the live line: now and then how many steps there are behind, and how long is left."""
    over = threading.Event()

    def print_progress() -> None:
        began, first = time.monotonic(), 0
        while not over.wait(REPORT_EVERY_S):
            rows = read_lines(run / run_files.METRICS, run_files.STEP, run_files.MAX_METRICS)
            step = rows[-1]["step"] if rows else 0
            if not first:
                began, first = time.monotonic(), step  # imports and the first steps are no measure
            elif first < step < steps:
                left = (time.monotonic() - began) / (step - first) * (steps - step)
                print(f"     step {step} of {steps}, about {duration(left)} left", flush=True)

    if not sys.stdout.isatty():
        threading.Thread(target=print_progress, name="progress", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def final_accuracies(run: Path) -> dict[str, Any]:
    """Student and teacher top-1 of the run's last evaluation."""
    found, unreadable = read(run / run_files.EVALUATIONS, run_files.EVALUATION)
    for line in left_out(run / run_files.EVALUATIONS, unreadable):
        print(line)
    rows = [row for row in found if row["task"] == "zeroshot_classification"]
    last = max(row["step"] for row in rows)
    return {f"acc1_{row['weights']}": row["metrics"]["acc1"] for row in rows if row["step"] == last}


def print_summary(out: Path, result: dict[str, Any]) -> None:
    """The closing words: the numbers, against chance, and where everything is."""
    classes = result["classes"]
    times = {name: result[f"acc1_{name}"] * classes for name in ("student", "teacher")}
    print(
        f"\nA-CLIP tiny after {result['steps']} steps, {result['train_seconds']:.0f} s of training:"
        f"\n  top-1 on {classes} classes of held-out scenes: student {result['acc1_student']:.1%}"
        f" ({times['student']:.1f} x chance), teacher {result['acc1_teacher']:.1%} ({times['teacher']:.1f} x chance)"
        f"\n  the same steps with tokens removed at random ({CONTROL}): {result['acc1_random']:.1%}"
        f"\n  of these, the student has the right colour in {result['acc1_colour']:.1%}, the right shape in"
        f" {result['acc1_shape']:.1%} (chance {1 / 8:.1%} each)"
        f"\n  object tokens kept: attentive {result['object_kept_attentive']:.2f},"
        f" random {result['object_kept_random']:.2f}"
        f"\n\n  {out}/masks.png   what the masks keep on held-out scenes"
        f"\n  {out}/curves.png  losses and accuracy"
        f"\n  {out}/demo.json   these numbers"
        f"\n  {result['run']}/  the run: config.yaml, metrics.jsonl, eval.jsonl, tensorboard/, weights"
        f"\n  {result['control']}/  its control"
        f"\n\nAll of it took {result['seconds']:.0f} s, set-up included. Next: `amclip train --help`, README."
    )


if __name__ == "__main__":
    print("python -m amclip_ds.demo runs nothing; type: python -m amclip_ds demo (or amclip demo)", file=sys.stderr)
    sys.exit(2)
