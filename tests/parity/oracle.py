"""Reads an oracle file (one run of the published code on a tiny model) and replays that run with our modules."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from amclip_ds import objectives, step
from amclip_ds.comm import Comm, SingleProcess
from amclip_ds.compat import COMPAT
from amclip_ds.data import photometric
from amclip_ds.engine.student import StepOutcome
from amclip_ds.masks import MaskConfig
from amclip_ds.method import Method
from amclip_ds.model.amclip import AClip
from amclip_ds.model.config import HeadsConfig, LossConfig, ModelConfig, TeacherConfig, TextConfig, VisionConfig
from amclip_ds.model.features import Features
from amclip_ds.model.names import present_name
from amclip_ds.model.scoring import scores_to_views
from amclip_ds.model.teacher_model import Observed, TeacherModel, mirrored_names
from amclip_ds.objectives.simclr import online_to_online
from amclip_ds.optim import OptimConfig, Schedules, build_optimizer, parameter_groups
from amclip_ds.resilience.config import GuardsConfig
from amclip_ds.resilience.guards import Guards
from tests.distributed.batches import made_batch

LN_100 = 4.605170185988092


@dataclass
class Oracle:
    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of a section, without its prefix."""
        return {name[len(prefix) :]: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    @property
    def steps(self) -> int:
        return self.meta["config"]["steps"]


def read(path: Path) -> Oracle:
    """A *.safetensors file and the *.json beside it."""
    return Oracle(load_file(path), json.loads(path.with_suffix(".json").read_text()))


# Oracle name (student side) -> ours.
STUDENT_NAMES = [
    (r"visual\.(.*)", r"vision.\1"),
    (r"token_embedding\.weight", "text.embeddings.token_embedding.weight"),
    (r"positional_embedding", "text.embeddings.position_embedding.weight"),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.(.*)", r"text.encoder.layers.\1.layer_norm\2.\3"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(.*)", r"text.encoder.layers.\1.mlp.fc1.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(.*)", r"text.encoder.layers.\1.mlp.fc2.\2"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(.*)", r"text.encoder.layers.\1.self_attn.out_proj.\2"),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(.*)", r"text.encoder.layers.\1.self_attn.{qkv}_proj.\2"),
    (r"ln_final\.(.*)", r"text.final_layer_norm.\1"),
    (r"(image|text)_projection", r"\1_projection.weight"),
    (r"image_mlp\.layer1\.(.*)", r"heads.o2o.layers.0.\1"),
    (r"image_mlp\.bn1\.(.*)", r"heads.o2o.layers.1.\1"),
    (r"image_mlp\.layer2\.(.*)", r"heads.o2o.layers.3.\1"),
    (r"image_mlp\.bn2\.(.*)", r"heads.o2o.layers.4.\1"),
    (r"image_mlp\.layer3\.(.*)", r"heads.o2o.layers.6.\1"),
    (r"im_proj_byol\.(.*)", r"heads.o2e_projector.layers.\1"),
    (r"im_pred_byol\.(.*)", r"heads.o2e_predictor.layers.\1"),
    (r"logit_scale", "logit_scale"),
]
TEACHER_PREFIXES = [
    (r"visual_ema\.", "visual."),
    (r"transformer_e\.", "transformer."),
    (r"(image|text)_projection_e$", r"\1_projection"),
    (r"im_proj_byol_e\.", "im_proj_byol."),
]


def our_names(oracle_name: str) -> list[str]:
    """The tensors of ours that an oracle's student tensor holds: three for a fused in_proj, else one."""
    for pattern, ours in STUDENT_NAMES:
        found = re.fullmatch(pattern, oracle_name)
        if found:
            name = present_name(found.expand(ours))
            return [name.replace("{qkv}", part) for part in "qkv"] if "{qkv}" in name else [name]
    raise KeyError(f"no counterpart for {oracle_name}")


def student_name(oracle_teacher_name: str) -> str | None:
    """The student's oracle name of a teacher tensor; None where the tensor is not the teacher's."""
    for pattern, replacement in TEACHER_PREFIXES:
        if re.match(pattern, oracle_teacher_name):
            return re.sub(pattern, replacement, oracle_teacher_name)
    return None


def to_ours(tensors: dict[str, Tensor], teacher: bool) -> dict[str, Tensor]:
    """One side's oracle tensors under our names and in our layout."""
    ours = {}
    for oracle_name, tensor in tensors.items():
        as_student = student_name(oracle_name)
        if (as_student is not None) != teacher:
            continue
        name = as_student or oracle_name
        parts = our_names(name)
        if name in ("image_projection", "text_projection"):
            tensor = tensor.T
        if name == "logit_scale":
            tensor = tensor.reshape(1)
        # Contiguous: torch's fused AdamW takes a gradient's memory order for the weight's.
        tensor = tensor.contiguous()
        ours.update(zip(parts, tensor.chunk(3) if len(parts) == 3 else [tensor]))
    return ours


def from_ours(ours: dict[str, Tensor], oracle_name: str) -> Tensor:
    """Our tensors in the form of an oracle's tensor (student or teacher side)."""
    name = student_name(oracle_name) or oracle_name
    parts = [ours[part] for part in our_names(name)]
    tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
    if name in ("image_projection", "text_projection"):
        return tensor.T
    return tensor.reshape(()) if name == "logit_scale" else tensor


def settings(oracle: Oracle) -> tuple[ModelConfig, HeadsConfig, LossConfig, MaskConfig, OptimConfig]:
    """Our configuration of the oracle's run."""
    weights, meta = oracle.under("init/"), oracle.meta
    patch = weights["visual.patch_embed.proj.weight"].shape[-1]
    width = weights["visual.cls_token"].shape[-1]
    grid = round((weights["visual.pos_embed"].shape[1] - 1) ** 0.5)
    vocab, text_width = weights["token_embedding.weight"].shape
    mlp = weights["visual.blocks.0.mlp.fc1.weight"].shape[0]
    vision = VisionConfig(
        name="vit_base_patch16_224",
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        depth=_count(weights, r"visual\.blocks\.(\d+)\..*"),
        heads=_number(meta["model"]["vision"], r"heads (\d+)"),
        mlp_ratio=mlp / width,
    )
    text = TextConfig(
        width=text_width,
        depth=_count(weights, r"transformer\.resblocks\.(\d+)\..*"),
        heads=_number(meta["model"]["text"], r"heads (\d+)"),
        context_length=weights["positional_embedding"].shape[0],
        vocab_size=vocab,
        eos_token_id=_number(meta["model"]["text"], r"eos_token_id = (\d+)"),
        activation="quick_gelu",
    )
    hidden = weights["image_mlp.layer1.weight"].shape[0]
    output = weights["image_mlp.layer3.weight"].shape[0]
    config = meta["config"]
    return (
        ModelConfig(vision=vision, text=text, embed_dim=weights["image_projection"].shape[1]),
        HeadsConfig(hidden_dim=hidden, output_dim=output),
        LossConfig(),
        MaskConfig(strategy="attentive", keep_ratio=config["mask_ratio"]),
        OptimConfig(lr=config["lr"], weight_decay=config["wd"]),
    )


def _count(weights: dict[str, Tensor], pattern: str) -> int:
    found = [re.fullmatch(pattern, name) for name in weights]
    return 1 + max(int(match[1]) for match in found if match)


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in {text!r}"
    return int(found[1])


@dataclass
class Step:
    """What one step of ours gave, in the oracle's layout where it has one."""

    teacher_scores: Tensor
    view_scores: Tensor
    kept: Tensor
    losses: dict[str, float]
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]


@dataclass
class Replay:
    """The oracle's run by our modules: each step, and the state after the last, under our names."""

    steps: list[Step] = field(default_factory=list)
    student: dict[str, Tensor] = field(default_factory=dict)
    teacher: dict[str, Tensor] = field(default_factory=dict)
    decayed: set[str] = field(default_factory=set)
    frozen: set[str] = field(default_factory=set)


def build(oracle: Oracle) -> tuple[AClip, TeacherModel]:
    """Our student and teacher with the oracle's first weights."""
    model, heads, loss, _, _ = settings(oracle)
    built = objectives.builder(objectives.chosen(loss, heads, pairs_views=False))
    student, teacher = AClip(model, built), TeacherModel(model, built)
    student.load_state_dict(to_ours(oracle.under("init/"), teacher=False))
    teacher.load_state_dict(to_ours(oracle.under("init/"), teacher=True), strict=False)
    mirror(student, teacher)
    return student, teacher


@torch.no_grad()
def mirror(student: nn.Module, teacher: nn.Module) -> None:
    online = dict(student.named_parameters())
    names = mirrored_names(dict(teacher.named_parameters()), averages_text_ends=False)
    for name, parameter in teacher.named_parameters():
        if name in names:
            parameter.copy_(online[name])


@torch.no_grad()
def average(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    online = dict(student.named_parameters())
    for name, parameter in teacher.named_parameters():
        parameter.lerp_(online[name], 1 - momentum)


def inputs(oracle: Oracle) -> tuple[Tensor, Tensor]:
    """views [2 * B, 3, H, W] view-major and teacher images [B, 3, H, W], checked against the file's sums."""
    size, batch = settings(oracle)[0].vision.image_size, oracle.meta["config"]["batch"]
    draw = torch.Generator().manual_seed(oracle.meta["seed"] + 1)
    views = torch.randn(2 * batch, 3, size, size, generator=draw)
    teacher_images = torch.randn(batch, 3, size, size, generator=draw)
    for images, key in ((views, "views_checksum"), (teacher_images, "teacher_checksum")):
        sums = [images.double().sum().item(), images.double().abs().sum().item()]
        assert all(abs(a - b) < 1e-2 for a, b in zip(sums, oracle.meta[key])), f"{key}: {sums} for {oracle.meta[key]}"
    return views, teacher_images


class PlainStudent:
    """What a step asks of the student's engine, by a module and torch's optimizer alone."""

    def __init__(self, module: AClip, optim: OptimConfig) -> None:
        self.module = module
        self.groups = parameter_groups(module.named_parameters(), optim)
        self.optimizer = build_optimizer(self.groups, optim)
        self.encode_and_losses = module.encode_and_losses
        self.grads: dict[str, Tensor] = {}

    scores_to_views = staticmethod(scores_to_views)

    def change_views(self, views_uint8: Tensor, changes: photometric.Photometric) -> Tensor:
        return photometric.apply(views_uint8, changes)

    def normalise(self, images_uint8: Tensor) -> Tensor:
        return photometric.normalise(images_uint8)

    def set_lr(self, lr: float, progress: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.grads = {name: p.grad.clone() for name, p in self.module.named_parameters() if p.grad is not None}

    def step(self) -> StepOutcome:
        self.optimizer.step()
        return StepOutcome(True, 0.0)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        self.module.logit_scale.clamp_(0, LN_100)

    def commit(self, comm: Comm, progress: float) -> None:
        pass


class PlainTeacher:
    """The teacher too; the published code averages and mirrors before a step, so the last update is left out."""

    def __init__(self, module: TeacherModel, student: AClip, updates: int) -> None:
        self.module, self.student, self.updates = module, student, updates
        self.observed = Observed({}, None)

    @torch.no_grad()
    def observe(self, images: Tensor, wants: frozenset[str], comm: Comm, progress: float) -> Observed:
        self.observed = self.module.observe(images, wants, comm, progress)
        return self.observed

    def update(self, momentum: float) -> None:
        self.updates -= 1
        if self.updates >= 0:
            average(self.student, self.module, momentum)

    def publish(self, whole: bool) -> None:
        if self.updates >= 0:
            mirror(self.student, self.module)


class Outputs:
    """What the objectives see and what leaves their heads in a step."""

    def __init__(self, student: AClip) -> None:
        self.seen: dict[str, Any] = {}
        parts: Any = student.objectives
        parts["contrastive"].register_forward_pre_hook(lambda _, inputs: self.keep("features", inputs[0]))
        parts["simclr"].head.register_forward_hook(lambda _, inputs, out: self.keep("o2o", out.detach()))
        parts["byol"].predictor.register_forward_hook(lambda _, inputs, out: self.keep("o2e", out.detach()))

    def keep(self, name: str, value: Any) -> None:
        self.seen[name] = value

    def in_the_oracles_layout(self, target: Tensor) -> dict[str, Tensor]:
        features: Features = self.seen["features"]
        assert features.image_embeds is not None and features.text_embeds is not None
        assert features.logit_scale is not None
        return {
            "image_embed": features.image_embeds.detach().flatten(0, 1),
            "text_embed": features.text_embeds.detach(),
            "image_ssl_embed": self.seen["o2o"],
            "byol_feats": self.seen["o2e"],
            "byol_feats_e": target,
            "logit_scale": features.logit_scale.detach().reshape(()),
        }


def replay(oracle: Oracle) -> Replay:
    """All the oracle's steps by amclip_ds/step.py, in the paper's order, under compat release."""
    model, heads, loss_config, mask, optim = settings(oracle)
    module, teacher_module = build(oracle)
    images, teacher_images = inputs(oracle)
    boxes = oracle.tensors["pos"].transpose(0, 1)
    views = images.unflatten(0, (2, -1))
    batch = made_batch(views, teacher_images, torch.zeros(2, views.shape[1], 0), oracle.tensors["text"])
    batch = replace(batch, views_uint8=views, teacher_uint8=teacher_images, boxes=boxes)
    optim = replace(optim, warmup_steps=0, final_lr=optim.lr)
    momentum = oracle.meta["config"]["momentum"]
    student = PlainStudent(module, optim)
    teacher = PlainTeacher(teacher_module, module, updates=oracle.steps - 1)
    outputs = Outputs(module)
    method = Method(
        objectives.chosen(loss_config, heads, pairs_views=False), (mask,) * 2, module.vision.grid, COMPAT["release"]
    )
    schedules = Schedules(optim, TeacherConfig(momentum=momentum, final_momentum=momentum), oracle.steps)
    result = Replay()
    result.decayed = {name for group in student.groups if group["weight_decay"] for name in group["names"]}
    result.frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    for index in range(oracle.steps):
        with already_normalised():
            done = step.train_step(
                batch,
                student,
                teacher,
                schedules,
                index,
                method,
                SingleProcess(),  # type: ignore[arg-type]
                micro=views.shape[1],
                guards=Guards(GuardsConfig()),
            )
        scores, [target] = teacher.observed.scores, teacher.observed.targets["byol"]
        assert scores is not None
        projected = outputs.seen["o2o"].unflatten(0, (2, -1))
        fixed = online_to_online(projected, loss_config.o2o_temperature, SingleProcess())
        result.steps.append(
            Step(
                teacher_scores=scores,
                view_scores=scores_to_views(scores, boxes, method.grid, unit=1),
                kept=torch.stack([kept for kept in done.keep_indices if kept is not None]),
                losses={
                    "loss": done.loss.item(),
                    "simclr_loss": done.parts["loss_o2o"].item(),
                    "im_byol_loss": done.parts["loss_o2e"].item(),
                    "contra_loss": done.parts["loss_contrastive"].item(),
                    "simclr_loss_fixed_pairing": fixed.item(),
                },
                outputs=outputs.in_the_oracles_layout(target),
                grads=student.grads,
            )
        )
    result.student = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    result.teacher = {name: tensor.clone() for name, tensor in teacher_module.state_dict().items()}
    return result


@contextmanager
def already_normalised() -> Iterator[None]:
    """The oracle's images are normal numbers, not pixels: the step takes them as they are."""
    apply, normalise = photometric.apply, photometric.normalise
    photometric.apply, photometric.normalise = (lambda views, changes: views), (lambda images: images)
    try:
        yield
    finally:
        photometric.apply, photometric.normalise = apply, normalise


def fed_optimizer(oracle: Oracle) -> dict[str, Tensor]:
    """Our optimizer over the oracle's own gradients: the weights after all its steps, under our names."""
    optim = settings(oracle)[-1]
    student, _ = build(oracle)
    optimizer = build_optimizer(parameter_groups(student.named_parameters(), optim), optim)
    for index in range(oracle.steps):
        grads = to_ours(oracle.under(f"step{index}/grad/"), teacher=False)
        for name, parameter in student.named_parameters():
            parameter.grad = grads[name].clone() if parameter.requires_grad else None
        optimizer.step()
        with torch.no_grad():
            student.logit_scale.clamp_(0, LN_100)
    return {name: parameter.detach() for name, parameter in student.named_parameters() if parameter.requires_grad}
