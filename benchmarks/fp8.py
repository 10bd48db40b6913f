"""What engine.fp8 changes: which tokens are kept, and the losses of a run, against bf16.

    python -m benchmarks.fp8 aclip-vitb16 --batch 256 --out fp8.jsonl
    python -m benchmarks.fp8 aclip-tiny --batch 32 --steps 5        # on a CPU: the same rounding, emulated

The recipe is trained from the same weights on the same batches with engine.fp8=none, teacher and all, ZeRO 1, bf16.
Losses: the largest and the mean relative difference from none over the steps, and the last step's. Kept tokens: one
batch's, by the bf16 teacher of the first run before its first and after its last step; the same weights and draws, but
the teacher in fp8. Beside it the same in fp32, whose difference is that of bf16's own rounding, and the share of tokens
that two draws at random would have in common. Where the mask reads no teacher there is nothing to compare. Images are
made scenes unless --data names shards. How fast each is: `python -m benchmarks.step RECIPE --set engine.fp8=teacher`.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amclip_ds import run
from amclip_ds.data import photometric
from amclip_ds.data.batch import Batch
from amclip_ds.engine import fp8
from amclip_ds.engine.ds_config import FP8_ALL, FP8_TEACHER, NO_FP8
from amclip_ds.model.teacher_model import TeacherModel
from amclip_ds.objectives import builder
from amclip_ds.step import student_inputs, teachers_images, train_step
from benchmarks.step import Ours, made_scenes

MODES = (NO_FP8, FP8_TEACHER, FP8_ALL)
EMULATED = not torch.cuda.is_available()


def built(recipe: str, mode: str, args: argparse.Namespace, scenes: Path) -> Ours:
    """The recipe's engines in one mode; without a GPU with emulated layers, which no setting asks for."""
    words = ["engine.deepspeed=zero1_bf16.json", *args.set, f"engine.fp8={NO_FP8 if EMULATED else mode}"]
    words += [f"data.train={args.data}"] if args.data else []
    ours = Ours(recipe, words, args.batch, (20, 20), scenes)
    if EMULATED and mode != NO_FP8:
        if ours.teacher:
            fp8.convert_towers(ours.teacher.placed.module, with_text=False, emulate=True)
        if mode == FP8_ALL:
            fp8.convert_towers(ours.student.module, with_text=True, emulate=True)
    return ours


def batches_of(ours: Ours, steps: int) -> list[Batch]:
    with closing(run.open_data(ours.config, ours.method, ours.runtime)) as data:
        return [batch.to(ours.runtime.device) for batch in islice(data.batches(None), steps)]


def train(ours: Ours, batches: list[Batch]) -> list[float]:
    """The loss of each step."""
    losses = []
    for update, batch in enumerate(batches):
        given = (batch, ours.student, ours.teacher, ours.schedules, update, ours.method, ours.comm)
        losses.append(float(train_step(*given, len(batch.sample_ids), ours.guards).loss))
    return losses


def copy_of_teacher(ours: Ours) -> nn.Module:
    """The teacher's weights in a module of their own, uncompiled."""
    assert ours.teacher is not None
    twin = TeacherModel(ours.config.model, builder(ours.method.objectives), ours.student.savings)
    twin.load_state_dict(ours.teacher.placed.module.state_dict())
    return twin.to(ours.runtime.device)


@torch.no_grad()
def kept_by(teacher: nn.Module, ours: Ours, batch: Batch) -> list[Tensor]:
    """[v * B, K] of each group of views, by a teacher's scores."""
    views = photometric.apply(batch.views_uint8, batch.photometric)
    scores = teacher(TeacherModel.attention, teachers_images(batch, views, ours.method))
    inputs = student_inputs(batch, views, scores, ours.method, 1.0)
    chosen = [ours.student.choose(group) for group in inputs.groups]
    return [kept for kept in chosen if kept is not None]


def share_in_common(ours: list[Tensor], theirs: list[Tensor], grid: int) -> float:
    """Of the tokens that one keeps, how many the other keeps too."""
    same = [(marked(a, grid) & marked(b, grid)).sum().item() / a.numel() for a, b in zip(ours, theirs)]
    return statistics.mean(same)


def marked(kept: Tensor, grid: int) -> Tensor:
    """[B, K] -> [B, N] bool."""
    return torch.zeros(len(kept), grid**2, dtype=torch.bool, device=kept.device).scatter_(1, kept, True)


def agreement(ours: Ours, batch: Batch) -> dict[str, float]:
    """Shares of kept tokens in common with the bf16 teacher."""

    def changed(change: Callable[[nn.Module], Any]) -> list[Tensor]:
        twin = copy_of_teacher(ours).bfloat16()
        change(twin)
        return kept_by(twin, ours, batch)

    grid = ours.method.grid
    plain = changed(lambda twin: None)
    in_fp8 = changed(lambda twin: fp8.convert_towers(twin, with_text=False, emulate=EMULATED))
    in_fp32 = changed(lambda twin: twin.float())
    chance = statistics.mean(kept.shape[1] for kept in plain) / grid**2
    return {
        "fp8": share_in_common(plain, in_fp8, grid),
        "fp32": share_in_common(plain, in_fp32, grid),
        "by_chance": chance,
    }


def compare(recipe: str, args: argparse.Namespace, scenes: Path) -> dict[str, Any]:
    """Every mode of a recipe that has something to convert."""
    losses: dict[str, list[float]] = {}
    kept: dict[str, dict[str, float]] = {}
    batches: list[Batch] = []
    for mode in MODES:
        ours = built(recipe, mode, args, scenes)
        batches = batches or batches_of(ours, args.steps)
        if mode == FP8_TEACHER and ours.teacher is None:
            continue
        looks = mode == NO_FP8 and "scores" in ours.method.mask_needs
        if looks:
            kept["first"] = agreement(ours, batches[0])
        losses[mode] = train(ours, batches)
        if looks:
            kept["last"] = agreement(ours, batches[0])
    plain = losses[NO_FP8]
    apart = {
        mode: [abs(a - b) / abs(b) for a, b in zip(found, plain)] for mode, found in losses.items() if mode != NO_FP8
    }
    return {"recipe": recipe, "losses": losses, "relative": apart, "kept_in_common": kept}


def show(row: dict[str, Any]) -> None:
    print(f"{row['recipe']}: engine.fp8   first loss   last loss   relative to none: largest   mean     last")
    for mode, losses in row["losses"].items():
        apart = row["relative"].get(mode)
        said = f"{max(apart):18.2e} {statistics.mean(apart):10.2e} {apart[-1]:9.2e}" if apart else ""
        print(f"{'':{len(row['recipe'])}}  {mode:10} {losses[0]:12.4f} {losses[-1]:11.4f} {said}")
    for when, shares in row["kept_in_common"].items():
        said = ", ".join(f"{name} {share:.4f}" for name, share in shares.items())
        print(
            f"{'':{len(row['recipe'])}}  kept tokens in common with bf16's teacher, {when} weights: {said}", flush=True
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--data", help="training shards")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="a file that the rows are added to, JSON lines")
    args = parser.parse_args()
    device = "CPU, emulated" if EMULATED else torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, batch {args.batch}, {args.steps} steps")
    with made_scenes(args.batch * args.steps) as scenes:
        for recipe in args.recipes:
            row = compare(recipe, args, scenes) | {"device": device, "batch": args.batch, "set": args.set}
            show(row)
            print(json.dumps(row))
            if args.out:
                with args.out.open("a") as file:
                    print(json.dumps(row), file=file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
