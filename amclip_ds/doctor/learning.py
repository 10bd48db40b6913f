"""Why a run does not learn: its numbers, its settings, its data and its weights, each against what learning needs."""

import math
import statistics
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from amclip_ds import config as settings
from amclip_ds import run_files
from amclip_ds.config import TrainConfig
from amclip_ds.doctor import FAIL, OK, WARN, Check, Finding
from amclip_ds.errors import DONE, TO_REQUEUE, UserError, in_one_line
from amclip_ds.jsonl import each, read
from amclip_ds.optim import REFERENCE_BATCH, REFERENCE_LR, endless_warmup, scaled_lr

EARLY = 20  # steps: before them nothing is judged
YOUNG = 1e6  # samples seen: before them an evaluation may be at chance
AT_CHANCE = 0.97  # of ln(candidates): a loss above it knows no pair
CEILING, FLOOR = 99.0, 1.05  # of the logit scale, which is held in [1, 100]
LR_RANGE = (1 / 100, 40.0)  # times the reference, scaled by the root of the batch; demos are at the upper end
SKIPPED = 0.05
SAMPLED = 512
EQUAL = 0.5  # of the negatives of a sample, on average, that are equal to it: a warning
ALIKE = 0.05  # of all pairs of samples that are equal: a failure
COLLAPSED = 0.98  # mean cosine of different images, or texts
ENCODED = 48
SIGMAS = 3.0
PUBLISHED = (  # samples seen -> zero-shot top-1 on ImageNet of CLIP ViT-B/16 (SLIP's tables)
    (117e6, 17.1, "CC3M, 40 epochs"),
    (367e6, 37.6, "YFCC-15M, 25 epochs"),
)


def checks(run: Path) -> dict[str, Check]:
    """By name. Raises UserError for a folder that is no run."""
    from amclip_ds import samples

    config = samples.config_of(run)
    rows, _ = read(run / run_files.METRICS, run_files.STEP, run_files.MAX_METRICS)
    rows = [row for row in rows if isinstance(row.get("loss"), float | int)]
    return {
        "ending": partial(_ending, run),
        "progress": partial(_progress, rows, config),
        "learning rate": partial(_learning_rate, rows, config),
        "loss": partial(_loss, rows, config),
        "logit scale": partial(_logit_scale, rows),
        "gradients": partial(_gradients, rows, config),
        "evaluation": partial(_evaluation, run, rows, config),
        "data": partial(_data, config),
        "features": partial(_features, run, config),
    }


def _ending(run: Path) -> Iterator[Finding]:
    from amclip_ds.record import read_verdict
    from amclip_ds.report.incidents import each_once

    verdict = read_verdict(run)
    kinds = Counter(row["kind"] for row in each_once(each(run / run_files.INCIDENTS, run_files.INCIDENT)))
    listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(6)) or "no incidents"
    if verdict is None:
        yield Finding("ending", OK, f"it runs, or ended without a word; {listed}")
    elif verdict["code"] in (DONE, TO_REQUEUE):
        yield Finding("ending", OK, f"code {verdict['code']}; {listed}")
    else:
        cause = in_one_line(verdict.get("cause") or verdict.get("reason") or "", 200)
        yield Finding(
            "ending", WARN, f"code {verdict['code']}: {cause}; {listed}", "out.log and incidents.jsonl say more"
        )


def _progress(rows: list[dict[str, Any]], config: TrainConfig) -> Iterator[Finding]:
    if not rows:
        yield Finding("progress", FAIL, "no step is recorded", "out.log ends with what it did last")
        return
    step, seen = rows[-1]["step"], rows[-1].get("samples_seen", 0)
    said = f"step {step:,}, {seen:,} samples seen"
    if step < EARLY:
        yield Finding("progress", WARN, f"{said}: too few to judge", "wait for some hundred steps")
    elif seen < YOUNG:
        fix = "near chance is to be expected on other data than its own; CLIP needs tens of millions of pairs"
        yield Finding("progress", OK, f"{said}: {fix}")
    else:
        yield Finding("progress", OK, f"{said}; {_expected(seen)}")


def _expected(seen: float) -> str:
    """What CLIP had published after about so many samples, in the logarithm of the samples."""
    (first, low, _), (last, high, _) = PUBLISHED
    shown = ", ".join(f"{accuracy}% after {count / 1e6:.0f} M ({which})" for count, accuracy, which in PUBLISHED)
    if not first <= seen <= last:
        return f"published, ImageNet zero-shot of CLIP ViT-B/16: {shown}"
    share = math.log(seen / first) / math.log(last / first)
    return f"ImageNet zero-shot of about {low + share * (high - low):.0f}% is usual by now ({shown})"


def _learning_rate(rows: list[dict[str, Any]], config: TrainConfig) -> Iterator[Finding]:
    optim, steps = config.optim, _planned_steps(config)
    if steps is not None and (endless := endless_warmup(optim, steps)):
        yield Finding("learning rate", FAIL, *endless)
    reference = scaled_lr(config.batch.global_size)
    factor = optim.lr / reference
    said = f"optim.lr={optim.lr:g} at batch.global_size={config.batch.global_size}"
    known = f"{REFERENCE_LR:g} at {REFERENCE_BATCH}, {reference:.1g} here by the root of the batch"
    if optim.name not in ("adamw", "muon"):
        yield Finding("learning rate", OK, f"{said} ({optim.name}: no reference is known)")
    elif factor > LR_RANGE[1]:
        yield Finding(
            "learning rate", FAIL, f"{said} is {factor:,.0f} times what is usual ({known})", f"optim.lr={reference:.1g}"
        )
    elif factor < LR_RANGE[0] and not config.model.init_from:  # a second stage's is a hundredth and less
        said += f" is {1 / factor:,.0f} times below what is usual ({known})"
        yield Finding("learning rate", FAIL, said, f"optim.lr={reference:.1g}")
    else:
        yield Finding("learning rate", OK, f"{said} ({known})")


def _planned_steps(config: TrainConfig) -> int | None:
    """The run's length; None where run.epochs says it and its data cannot be read here."""
    if config.run.steps is not None:
        return config.run.steps
    from amclip_ds import samples

    try:
        with samples.opened(config) as data:
            return settings.count_steps(config, data.steps_per_epoch)
    except (UserError, OSError, ValueError):
        return None


def _loss(rows: list[dict[str, Any]], config: TrainConfig) -> Iterator[Finding]:
    if not rows:
        return
    last = rows[-max(1, len(rows) // 10) :]
    if any(not math.isfinite(row["loss"]) for row in rows):
        yield Finding("loss", FAIL, "not finite in metrics.jsonl", _calmer(config))
    pairs = [row["loss_contrastive"] for row in last if isinstance(row.get("loss_contrastive"), float | int)]
    if not pairs or not any(pairs):
        yield Finding(
            "loss", WARN, "no contrastive term: images and texts are not brought together", "loss.contrastive_weight=1"
        )
        return
    now, floor = statistics.mean(pairs), math.log(config.batch.global_size)
    best = min(row["loss_contrastive"] for row in rows if isinstance(row.get("loss_contrastive"), float | int))
    if config.loss.kind == "sigmoid":
        yield Finding("loss", OK, f"contrastive (sigmoid) {now:.3f}, best {best:.3f}")
    elif rows[-1]["step"] >= EARLY and now > AT_CHANCE * floor:
        said = f"contrastive {now:.3f}: at chance, which is ln({config.batch.global_size}) = {floor:.3f}"
        fix = "what else fails here, first; if nothing does, captions may belong to other images: amclip data stats"
        yield Finding("loss", FAIL, said, fix)
    elif now > best + 0.3 * (floor - best) and now > 1.2 * best:
        at = next(row["step"] for row in rows if row.get("loss_contrastive") == best)
        said = f"contrastive {now:.3f}, and it was {best:.3f} at step {at}"
        yield Finding("loss", WARN, said, f"it diverged: {_calmer(config)}")
    else:
        yield Finding("loss", OK, f"contrastive {now:.3f}; chance is ln({config.batch.global_size}) = {floor:.3f}")


def _logit_scale(rows: list[dict[str, Any]]) -> Iterator[Finding]:
    scales = [(row["step"], row["logit_scale"]) for row in rows if isinstance(row.get("logit_scale"), float | int)]
    if not scales:
        return
    now = scales[-1][1]
    if now >= CEILING:
        since = next(step for step, scale in scales if scale >= CEILING)
        said = f"{now:.1f}: pinned at its ceiling of 100 since step {since}"
        fix = (
            "usual late in long runs; early it means too high a learning rate, or pairs that are too easy (duplicates)"
        )
        yield Finding("logit scale", WARN, said, fix)
    elif now <= FLOOR:
        said = f"{now:.2f}: pinned at its floor of 1: the model gave up distinguishing pairs"
        yield Finding("logit scale", FAIL, said, "a lower optim.lr; do captions and images belong together?")
    else:
        yield Finding("logit scale", OK, f"{now:.1f} (from {scales[0][1]:.1f})")


def _calmer(config: TrainConfig) -> str:
    """What makes large gradients harmless; muon's updates do not grow with them, and it takes no clipping."""
    return "a lower optim.lr" if config.optim.name == "muon" else "a lower optim.lr, optim.clip_grad_norm=1"


def _gradients(rows: list[dict[str, Any]], config: TrainConfig) -> Iterator[Finding]:
    applied = [row.get("step_applied") is not False for row in rows]
    norms = [row["grad_norm"] for row in rows if isinstance(row.get("grad_norm"), float | int)]
    skipped = 1 - sum(applied) / len(applied) if applied else 0.0
    if skipped > SKIPPED:
        yield Finding(
            "gradients", FAIL, f"{skipped:.0%} of the logged steps were skipped", "a lower optim.lr; incidents.jsonl"
        )
    elif norms and max(norms[-10:]) < 1e-6:
        yield Finding("gradients", FAIL, f"norm {norms[-1]:.1e}: nothing flows", "are the losses' weights 0?")
    elif norms and norms[-1] > 100 * statistics.median(norms):
        yield Finding("gradients", WARN, f"norm {norms[-1]:.1f}, 100 times the median", _calmer(config))
    elif norms:
        yield Finding("gradients", OK, f"norm {norms[-1]:.2f} (median {statistics.median(norms):.2f})")


def _evaluation(run: Path, rows: list[dict[str, Any]], config: TrainConfig) -> Iterator[Finding]:
    found, _ = read(run / run_files.EVALUATIONS, run_files.EVALUATION)
    made = [
        row
        for row in sorted(found, key=lambda row: row["step"])  # an older checkpoint may be evaluated later
        if isinstance(row["metrics"].get("acc1"), float | int)
        and row["step"] > 0
        and row["task"] not in run_files.PROBES
    ]
    if not made:
        yield Finding("evaluation", OK, "none with an accuracy (eval.data; amclip eval)")
        return
    row = made[-1]
    accuracy, count = row["metrics"]["acc1"], row.get("num_samples")
    classes = _num_classes(run, row)
    if not classes or type(count) is not int or count < 1:
        yield Finding("evaluation", OK, f"{row['dataset']} {row['weights']}: acc1 {accuracy:.4f} at step {row['step']}")
        return
    chance = 1 / classes
    above = (accuracy - chance) / math.sqrt(chance * (1 - chance) / count)
    said = f"{row['dataset']} {row['weights']}: acc1 {accuracy:.4f} at step {row['step']}, chance {chance:.4f}"
    if above < SIGMAS:
        is_young = not rows or rows[-1].get("samples_seen", 0) < YOUNG
        status, fix = (
            (WARN, "early: what else fails here, else train on") if is_young else (FAIL, "what else fails here")
        )
        yield Finding("evaluation", status, f"{said}: {above:+.1f} standard errors from chance", fix)
    else:
        yield Finding("evaluation", OK, f"{said} ({above:.0f} standard errors above)")


def _num_classes(run: Path, row: dict[str, Any]) -> int:
    """Of the set of a row of eval.jsonl; 0 where its classes were not kept."""
    kept, _ = read(run / run_files.CLASSES, run_files.OF_CLASSES)
    same = [one for one in kept if all(one[name] == row[name] for name in ("step", "weights", "dataset", "task"))]
    return len(same[-1]["per_class"]) if same else 0


def _data(config: TrainConfig) -> Iterator[Finding]:
    from amclip_ds import samples

    try:
        with samples.opened(config) as data:
            seen: list[samples.FoundSample] = []
            step = 1
            while len(seen) < SAMPLED and step <= data.steps_per_epoch:
                seen += samples.members_of(data, step, most=SAMPLED - len(seen))
                step += 1
    except (UserError, OSError, ValueError) as error:
        yield Finding("data", WARN, f"the run's shards cannot be read here: {in_one_line(error, 200)}")
        return
    yield _duplicates("captions", [one.caption.strip().lower() for one in seen], config.batch.global_size)
    yield _duplicates("images", [one.image for one in seen], config.batch.global_size)
    lengths = [len(one.caption.split()) for one in seen]
    if statistics.median(lengths) < 2:
        said = f"the median caption has {statistics.median(lengths):.0f} words"
        yield Finding("captions", WARN, said, "data.captions names the member or field with sentences")


def _duplicates(what: str, values: list[Any], batch: int) -> Finding:
    """Equal samples of a batch are each other's negatives, which no model can distinguish."""
    counts, number = Counter(values), len(values)
    share = sum(count * (count - 1) for count in counts.values()) / max(1, number * (number - 1))
    among = share * (batch - 1)
    said = (
        f"{among:.2g} of a sample's {batch - 1} negatives are equal to it ({len(counts)} different {what} in {number})"
    )
    common, times = counts.most_common(1)[0]
    if what == "captions" and times > 1:
        said += f"; {times} x {str(common)[:60]!r}"
    fix = "remove them from the shards (amclip data check counts them), or another data.captions"
    status = FAIL if share > ALIKE else WARN if among > EQUAL else OK
    return Finding(what, status, said, "" if status == OK else fix)


def _features(run: Path, config: TrainConfig) -> Iterator[Finding]:
    """Whether different images, and different texts, are embedded apart, and pairs together."""
    import torch

    from amclip_ds import samples
    from amclip_ds.evaluate.source import locate, open_encoder
    from amclip_ds.images import open_image

    try:
        located = locate(run)
        with samples.opened(config) as data:
            seen = samples.members_of(data, 1, most=ENCODED)
        seen = list({one.caption.lower(): one for one in seen}.values())
        encoder = open_encoder(located, "student", torch.device("cpu"))
        pictures = torch.stack([encoder.preprocess(open_image(one.image).picture()) for one in seen])
        images, texts = encoder.image(pictures), encoder.text([one.caption for one in seen])
    except (UserError, OSError, ValueError) as error:
        yield Finding("features", OK, f"not measured: {in_one_line(error, 200)}")
        return
    count = len(seen)
    if count < 4:
        yield Finding("features", WARN, f"{count} different captions among {ENCODED} samples: too few to compare")
        return
    others = ~torch.eye(count, dtype=torch.bool)
    spread = {name: float((x @ x.T)[others].mean()) for name, x in (("images", images), ("texts", texts))}
    cross = images @ texts.T
    margin = float(cross.diagonal().mean() - cross[others].mean())
    said = ", ".join(f"{name} {cosine:.3f}" for name, cosine in spread.items())
    collapsed = [name for name, cosine in spread.items() if cosine > COLLAPSED]
    if collapsed:
        said = f"collapsed: mean cosine of different {' and '.join(collapsed)} (1 is one point): {said}"
        yield Finding("features", FAIL, said, "a lower optim.lr or weight_decay, a longer warm-up; more different data")
    elif margin <= 0.01:
        said = f"pairs are no closer than others ({margin:+.3f}); mean cosines of different ones: {said}"
        yield Finding("features", WARN, said, "the captions may belong to other images (amclip data stats shows pairs)")
    else:
        yield Finding("features", OK, f"pairs {margin:+.3f} closer than others; mean cosines of different ones: {said}")
