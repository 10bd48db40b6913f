"""A plain one-process loop beside `amclip train`: same weights, scenes and batches, without DeepSpeed or shards.

    python -m benchmarks.plain_loop aclip-tiny --steps 20               # losses side by side, then the speeds
    python -m benchmarks.plain_loop random2x-tiny --steps 100 --set data.keep_colours=true

The loop: the towers and objectives as plain modules in fp32, torch's optimizer over their parameters, the gradient's
norm clipped by torch, the teacher a copy that is averaged parameter by parameter. What it shares with the product are
data, towers, masks, losses and schedules; engine, masters, sharded teacher, guards and record are not in it. Losses
must agree to 1e-5 relative for --steps steps (attentive masks: until a near tie keeps another token, which is said);
exit code 1 where they do not.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from amclip_ds import config as settings
from amclip_ds import run
from amclip_ds.comm import SingleProcess
from amclip_ds.config import TrainConfig
from amclip_ds.data import photometric
from amclip_ds.data.synthetic import write_dataset
from amclip_ds.engine.student import LOGIT_SCALE_RANGE
from amclip_ds.jsonl import read_lines
from amclip_ds.method import Method, method_of
from amclip_ds.model.amclip import AClip
from amclip_ds.model.init import initialise
from amclip_ds.model.teacher_model import TeacherModel
from amclip_ds.objectives import builder, start_of
from amclip_ds.optim import Schedules, build_optimizer, parameter_groups
from amclip_ds.ranks.runtime import Runtime
from amclip_ds.step import student_inputs

ALONE = Runtime(0, 1, 0, 1, 1, 0, torch.device("cpu"), "plain loop", True)
TOLERANCE = 1e-5


class PlainLoop:
    """Student, teacher and optimizer of a configuration in one process."""

    def __init__(self, config: TrainConfig, method: Method, total_steps: int) -> None:
        self.config, self.method, self.comm = config, method, SingleProcess()
        self.student = AClip(config.model, builder(method.objectives), config.engine.savings)
        self.teacher = TeacherModel(config.model, builder(method.objectives), config.engine.savings)
        start = start_of(config.run.seed, config.model, method.objectives)
        initialise(self.student, start)
        initialise(self.teacher, start)
        self.optimizer = build_optimizer(parameter_groups(self.student.named_parameters(), config.optim), config.optim)
        self.schedules = Schedules(config.optim, config.teacher, total_steps)
        self.updates = 0

    def step(self, batch: Any) -> float:
        """Trains on a batch; its loss."""
        scores, targets = None, {}
        if self.method.reads_teacher:
            with torch.no_grad():
                images = photometric.normalise(batch.teacher_uint8)
                seen = self.teacher.observe(images, self.method.wants, self.comm)
            scores, targets = seen.scores, seen.targets
        views = photometric.apply(batch.views_uint8, batch.photometric)
        inputs = student_inputs(batch, views, scores, self.method, self.schedules.progress(self.updates))
        losses, _ = self.student.encode_and_losses(inputs, targets, self.comm)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        trained = [parameter for parameter in self.student.parameters() if parameter.grad is not None]
        if self.config.optim.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, self.config.optim.clip_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedules.lr(self.updates) * group.get("lr_scale", 1.0)
        self.optimizer.step()
        self.updates += 1
        self._after_step()
        return float(losses.total.detach())

    @torch.no_grad()
    def _after_step(self) -> None:
        self.student.logit_scale.clamp_(*LOGIT_SCALE_RANGE)
        for objective in self.student.objectives.values():
            objective.commit(self.comm)  # type: ignore[operator]
        momentum = self.schedules.momentum(self.updates)
        masters = dict(self.student.named_parameters())
        for name, average in self.teacher.named_parameters():
            if masters[name].requires_grad:
                average.lerp_(masters[name], 1.0 - momentum)


def product_losses(config_words: list[str], recipe: str, out: Path) -> tuple[list[float], float]:
    """The losses of `amclip train`, and its samples a second."""
    command = [sys.executable, "-m", "amclip_ds", "train", recipe, *config_words, f"run.out={out}"]
    subprocess.run([*command, "log.every_steps=1", "--resume", "never"], check=True, stdout=subprocess.DEVNULL)
    rows = read_lines(out / "metrics.jsonl")
    return [row["loss"] for row in rows], sorted(row["samples_per_s"] for row in rows)[len(rows) // 2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--scenes", type=Path, help="of `amclip data synth`; made where it is left out")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="plain-") as folder:
        scenes = args.scenes or Path(folder, "scenes")
        if not args.scenes:
            write_dataset(scenes, max(256, args.batch * min(args.steps, 100)), 0, 64, 0)
        words = [
            f"data.train={scenes}/train",
            f"run.steps={args.steps}",
            "run.epochs=null",
            "data.workers=0",
            f"batch.global_size={args.batch}",
            f"batch.per_gpu={args.batch}",
            "engine.deepspeed=zero1_fp32.json",
            "engine.compile=none",
            "log.tensorboard=false",
            f"data.index={folder}/index",
            *args.set,
        ]
        ours, rate = product_losses(words, args.recipe, Path(folder, "run"))
        config = settings.load(args.recipe, [*words, f"run.out={folder}/plain"])
        method = method_of(config)
        loop = PlainLoop(config, method, args.steps)
        with closing(run.open_data(config, method, ALONE)) as data:
            stream = data.batches(None)
            theirs, times = [], []
            for _ in range(args.steps):
                began = time.perf_counter()
                theirs.append(loop.step(next(stream)))
                times.append(time.perf_counter() - began)
    apart = [abs(own - plain) / abs(plain) for own, plain in zip(ours, theirs, strict=True)]
    for step, (own, plain, difference) in enumerate(zip(ours, theirs, apart), 1):
        if step <= 5 or step == args.steps or difference > TOLERANCE:
            print(f"step {step:4}: {own:.7f} {plain:.7f}  {difference:.1e}")
    agreed = next((step for step, difference in enumerate(apart) if difference > TOLERANCE), args.steps)
    plain_rate = args.batch / sorted(times)[len(times) // 2]
    largest = max(apart[:agreed], default=0.0)
    print(
        f"{args.recipe}: equal to {TOLERANCE:.0e} for {agreed} of {args.steps} steps (largest before: {largest:.1e});"
        f" {rate:.0f} samples/s by the product, {plain_rate:.0f} by the loop"
    )
    return int(agreed < args.steps)


if __name__ == "__main__":
    sys.exit(main())
