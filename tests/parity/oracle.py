"""Reads an oracle file (one run of the published code on a tiny model) and replays that run with our modules."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from amclip_ds.loss import LossConfig
from amclip_ds.loss.comm import SingleProcess
from amclip_ds.loss.self_supervised import online_to_online
from amclip_ds.loss.total import total_loss
from amclip_ds.model.amclip import AClip, ModelConfig
from amclip_ds.model.heads import HeadsConfig
from amclip_ds.model.masking import MaskConfig, select
from amclip_ds.model.scoring import scores_to_views
from amclip_ds.model.teacher_model import TeacherModel, mirrored_names
from amclip_ds.model.text import TextConfig
from amclip_ds.model.vision import VisionConfig
from amclip_ds.optim import OptimConfig, build_optimizer, parameter_groups

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
            name = found.expand(ours)
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
    student, teacher = AClip(model, heads, loss), TeacherModel(model, heads, loss)
    student.load_state_dict(to_ours(oracle.under("init/"), teacher=False))
    teacher.load_state_dict(to_ours(oracle.under("init/"), teacher=True), strict=False)
    mirror(student, teacher)
    return student, teacher


@torch.no_grad()
def mirror(student: nn.Module, teacher: nn.Module) -> None:
    online = dict(student.named_parameters())
    names = mirrored_names(dict(teacher.named_parameters()), "release")
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


def replay(oracle: Oracle) -> Replay:
    """All the oracle's steps, in the paper's order, under compat release."""
    model, _, loss_config, mask, optim = settings(oracle)
    student, teacher = build(oracle)
    views, teacher_images = inputs(oracle)
    boxes = oracle.tensors["pos"].transpose(0, 1)
    groups = parameter_groups(student.named_parameters(), optim)
    optimizer = build_optimizer(groups, optim)
    result = Replay()
    result.decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    result.frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    for index in range(oracle.steps):
        if index:
            average(student, teacher, oracle.meta["config"]["momentum"])
        mirror(student, teacher)
        with torch.no_grad():
            target, scores = teacher("scores", images=teacher_images)
        grid = student.vision.grid
        keep = select(mask, grid, scores_to_views(scores, boxes, grid, mask.unit))
        outputs = student("all", images=views, keep_indices=keep.flatten(0, 1), token_ids=oracle.tensors["text"])
        loss, terms = total_loss(outputs, target, loss_config, SingleProcess(), compat="release")
        fixed = online_to_online(outputs.o2o, loss_config.o2o_temperature, SingleProcess(), compat="paper")
        optimizer.zero_grad()
        loss.backward()
        result.steps.append(
            Step(
                teacher_scores=scores,
                view_scores=scores_to_views(scores, boxes, grid, unit=1),
                kept=keep,
                losses={
                    "loss": loss.item(),
                    "simclr_loss": terms["loss_o2o"].item(),
                    "im_byol_loss": terms["loss_o2e"].item(),
                    "contra_loss": terms["loss_contrastive"].item(),
                    "simclr_loss_fixed_pairing": fixed.item(),
                },
                outputs={
                    "image_embed": outputs.image_embeds.detach().flatten(0, 1),
                    "text_embed": outputs.text_embeds.detach(),
                    "image_ssl_embed": outputs.o2o.detach().flatten(0, 1),
                    "byol_feats": outputs.o2e.detach().flatten(0, 1),
                    "byol_feats_e": target,
                    "logit_scale": outputs.logit_scale.detach().reshape(()),
                },
                grads={name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None},
            )
        )
        optimizer.step()
        with torch.no_grad():
            student.logit_scale.clamp_(0, LN_100)
    result.student = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    result.teacher = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    return result


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
