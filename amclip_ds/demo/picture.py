"""The pictures a run ends with: what the masks keep on held-out scenes, and the curves of losses and accuracy."""

from pathlib import Path

from torch import Tensor

from amclip_ds import run_files
from amclip_ds.demo.scenes import MaskedScenes
from amclip_ds.jsonl import read_lines
from amclip_ds.pictures import darkened
from amclip_ds.plots import pyplot

SCENES = 8  # rows of the picture


def draw_masks(masked: MaskedScenes, file: Path) -> None:
    """A row a scene: the teacher's crop with its caption, its scores, and both views under each mask."""
    plt = pyplot()
    num_views, grid = len(masked.views_uint8), int(masked.is_object.shape[-1] ** 0.5)
    views = [f"{name}, view {view + 1}" for name in masked.kept for view in range(num_views)]
    titles = ["teacher's crop", "its scores", *views]
    figure, axes = plt.subplots(SCENES, len(titles), figsize=(1.75 * len(titles), 1.95 * SCENES), squeeze=False)
    for scene, row in enumerate(axes):
        side = int(masked.scores.shape[1] ** 0.5)
        row[0].imshow(_pixels(masked.teacher_uint8[scene]))
        row[0].set_xlabel(masked.captions[scene], fontsize=8)
        row[1].imshow(masked.scores[scene].reshape(side, side), cmap="magma")
        panels = iter(row[2:])
        for keep_indices in masked.kept.values():
            for view in range(num_views):
                shown = darkened(masked.views_uint8[view, scene], keep_indices[view][scene], grid)
                next(panels).imshow(_pixels(shown))
        for axis, title in zip(row, titles):
            axis.set_xticks([])
            axis.set_yticks([])
            if scene == 0:
                axis.set_title(title, fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_curves(run: Path, file: Path, control: Path | None = None) -> None:
    """Losses, zero-shot accuracy of student and teacher, and the rate of training, by step.

    control: another run, whose student's accuracy is beside them.
    """
    plt = pyplot()
    metrics = read_lines(run / run_files.METRICS, run_files.STEP, run_files.MAX_METRICS)
    figure, (losses, accuracy, rate) = plt.subplots(1, 3, figsize=(13, 3.6))
    steps = [row["step"] for row in metrics]
    named = dict.fromkeys(key for row in metrics for key in row if key == "loss" or key.startswith("loss_"))
    for name in (name for name in named if any(row.get(name) for row in metrics)):  # a term of no weight is 0
        losses.plot(steps, [row.get(name) for row in metrics], label=name, linewidth=1)
    losses.set_title("losses")
    shown = [(run, "student", "student"), (run, "teacher", "teacher")]
    for of, weights, label in [*shown, *([(control, "student", "random masks, student")] if control else [])]:
        rows = [
            row
            for row in read_lines(of / run_files.EVALUATIONS, run_files.EVALUATION)
            if row["weights"] == weights and row["task"] == "zeroshot_classification"
        ]
        accuracy.plot([row["step"] for row in rows], [row["metrics"]["acc1"] for row in rows], "o-", label=label)
    accuracy.set_title("zero-shot top-1 on held-out data")
    accuracy.set_ylim(bottom=0)
    rate.plot(steps, [row.get("samples_per_s") for row in metrics], linewidth=1, label="samples per second")
    rate.set_title("rate")
    rate.set_ylim(bottom=0)
    for axis in (losses, accuracy, rate):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _pixels(image_uint8: Tensor) -> Tensor:
    """[3, H, H] -> [H, H, 3]"""
    return image_uint8.permute(1, 2, 0)
