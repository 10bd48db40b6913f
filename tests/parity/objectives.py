"""The objectives against the published code's numbers: losses within 1e-6 relative, gradients 1e-5 of the largest."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amclip_ds.comm import Comm
from amclip_ds.model.amclip import Sizes
from amclip_ds.model.config import HeadsConfig
from amclip_ds.model.features import Features
from amclip_ds.model.towers import normalise
from amclip_ds.objectives import clipkd, contrastive, patches, simclr
from amclip_ds.objectives.sigmoid import sigmoid
from tests.parity.numbers import ALONE, Numbers, close, close_gradient, close_loss
from tests.unit.thread_ranks import run_threads


def leaves(numbers: Numbers, names: list[str]) -> dict[str, Tensor]:
    return {name: numbers[name].clone().requires_grad_() for name in names}


def slip_objectives(numbers: Numbers, norm_by: str) -> tuple[contrastive.Contrastive, simclr.SimCLR]:
    """With the file's head."""
    size = numbers.meta["sizes"]
    heads = HeadsConfig(norm_by=norm_by, hidden_dim=size["ssl_mlp_dim"], output_dim=size["ssl_emb_dim"])
    sizes = Sizes(size["vision_width"], size["text_width"], size["embed"], 1, 1, 1, 1)
    ssl = simclr.SimCLR(simclr.Options(1.0, temperature=numbers.meta["temperature"], views=[1, 2], heads=heads), sizes)
    state = {}
    for ours, theirs in enumerate(("layer1", "bn1", "", "layer2", "bn2", "", "layer3")):
        for part in ("weight", "bias") if theirs else ():
            state[f"head.layers.{ours}.{part}"] = numbers[f"w/image_mlp.{theirs}.{part}"]
    statistics = {
        name: torch.zeros_like(value) if "mean" in name or "num" in name else torch.ones_like(value)
        for name, value in ssl.state_dict().items()
        if name not in state
    }
    ssl.load_state_dict(state | statistics)
    return contrastive.Contrastive(contrastive.Options(1.0, views=[0]), sizes), ssl


INPUTS = [
    "in/cls_image",
    "in/cls_aug1",
    "in/cls_aug2",
    "in/eot",
    "w/image_projection",
    "w/text_projection",
    "w/logit_scale",
]


def slip_losses(given: dict[str, Tensor], ssl: simclr.SimCLR, clip: Any) -> tuple[Tensor, Tensor]:
    image = normalise(given["in/cls_image"] @ given["w/image_projection"])
    text = normalise(given["in/eot"] @ given["w/text_projection"])
    scale = given["w/logit_scale"].exp()
    of_clip = clip(Features(image_embeds=image[None], text_embeds=text, logit_scale=scale), (), ALONE)
    cls = torch.stack([given["in/cls_aug1"], given["in/cls_aug2"]])
    return of_clip["contrastive"], ssl(Features(cls=cls), (), ALONE)["o2o"]


def check_slip(numbers: Numbers) -> None:
    given = leaves(numbers, INPUTS)
    clip, ssl = slip_objectives(numbers, "view")
    clip_loss, ssl_loss = slip_losses(given, ssl, clip)
    losses = numbers.meta["losses"]
    for ours, name in ((clip_loss, "clip_loss"), (ssl_loss, "ssl_loss"), (clip_loss + ssl_loss, "loss")):
        close_loss(ours, losses[name], name)
    weights = dict(ssl.named_parameters())
    for loss, part in ((clip_loss, "grad_clip"), (ssl_loss, "grad_ssl"), (clip_loss + ssl_loss, "grad_total")):
        names = [name for name in numbers.names(f"{part}/") if "image_mlp" not in name]
        inputs = [given[name.removeprefix(f"{part}/")] for name in names]
        for name, found in zip(names, torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)):
            close_gradient(found, numbers[name], name)
    found_of = dict(zip(weights, torch.autograd.grad(ssl_loss, list(weights.values()), retain_graph=True)))
    for place, theirs in enumerate(("layer1", "bn1", "", "layer2", "bn2", "", "layer3")):
        for part in ("weight", "bias") if theirs else ():
            name = f"grad_total/w/image_mlp.{theirs}.{part}"
            if name not in ZERO_IN_EXACT_ARITHMETIC:
                close_gradient(found_of[f"head.layers.{place}.{part}"], numbers[name], name)
            numbers[name]
    for place, theirs in ((1, "bn1"), (4, "bn2")):
        for part in ("running_mean", "running_var"):
            ours = ssl.state_dict()[f"head.layers.{place}.{part}"]
            close(ours, numbers[f"after/image_mlp.{theirs}.{part}"], f"after/{theirs}.{part}", rtol=1e-5)


ZERO_IN_EXACT_ARITHMETIC = {  # a batch norm follows
    "grad_total/w/image_mlp.layer1.bias",
    "grad_total/w/image_mlp.layer2.bias",
}


def check_slip_outputs(numbers: Numbers) -> None:
    """Before normalisation."""
    image = numbers["in/cls_image"] @ numbers["w/image_projection"]
    close(image, numbers["out/image_embed"], "out/image_embed", rtol=1e-5)
    close(numbers["in/eot"] @ numbers["w/text_projection"], numbers["out/text_embed"], "out/text_embed", rtol=1e-5)
    for norm_by, part in (("view", "out"), ("batch", "joint/out")):
        _, ssl = slip_objectives(numbers, norm_by)
        cls = torch.stack([numbers["in/cls_aug1"], numbers["in/cls_aug2"]])
        found = simclr.of_views(ssl.head, cls, ALONE.all_reduce_sum, ssl.options.heads)
        for view, ours in enumerate(found, start=1):
            close(ours, numbers[f"{part}/aug{view}_embed"], f"{part}/aug{view}_embed", rtol=1e-5)


def check_slip_joint_norm(numbers: Numbers) -> None:
    given = leaves(numbers, INPUTS)
    clip, ssl = slip_objectives(numbers, "batch")
    _, loss = slip_losses(given, ssl, clip)
    close_loss(loss, numbers.meta["losses"]["ssl_loss_joint_batchnorm"], "ssl_loss_joint_batchnorm")
    views = ["in/cls_aug1", "in/cls_aug2"]
    for name, found in zip(views, torch.autograd.grad(loss, [given[view] for view in views])):
        close_gradient(found, numbers[f"joint/grad_ssl/{name}"], f"joint/{name}")


def on_two_ranks(
    rows: list[Tensor], loss_of: Callable[[list[Tensor], Comm], Tensor]
) -> tuple[list[float], list[Tensor]]:
    """Each rank's loss on its half of the rows, and the gradient of their mean, as a trainer averages it."""
    given = [tensor.clone().requires_grad_() for tensor in rows]

    def work(comm: Comm) -> Tensor:
        return loss_of([tensor.chunk(2)[comm.rank] for tensor in given], comm)

    losses = run_threads(2, work)
    return [float(loss.detach()) for loss in losses], list(torch.autograd.grad(torch.stack(losses).mean(), given))


def check_slip_on_two_ranks(numbers: Numbers) -> None:
    """Right gradients; and the published ones, which gather without, under loss.release=slip compat=release."""
    scale = numbers["w/logit_scale"].exp()
    embeds = [numbers["out/image_embed"], numbers["out/text_embed"]]

    def clip_loss(gathers_gradient: bool) -> Callable[[list[Tensor], Comm], Tensor]:
        return lambda rows, comm: contrastive.info_nce(
            normalise(rows[0])[None], normalise(rows[1]), scale, comm, gathers_gradient=gathers_gradient
        )

    def ssl_loss(rows: list[Tensor], comm: Comm) -> Tensor:
        return simclr.online_to_online(torch.stack(rows), numbers.meta["temperature"], comm)

    facts = numbers.meta["two_ranks"]
    augs = [numbers["out/aug1_embed"], numbers["out/aug2_embed"]]
    for part, names, rows, cases in (
        (
            "clip",
            ("image_embed", "text_embed"),
            embeds,
            {"global_grad": clip_loss(True), "published_grad_mean_over_ranks": clip_loss(False)},
        ),
        (
            "simclr",
            ("aug1_embed", "aug2_embed"),
            augs,
            {"global_grad": ssl_loss, "published_grad_mean_over_ranks": ssl_loss},
        ),
    ):
        for case, loss_of in cases.items():
            losses, gradients = on_two_ranks(rows, loss_of)
            for ours, theirs in zip(losses, facts[part]["loss_of_rank"], strict=True):
                close_loss(torch.tensor(ours), theirs, f"two_ranks/{part}: loss of a rank")
            for name, found in zip(names, gradients):
                close_gradient(found, numbers[f"two_ranks/{part}/{case}/{name}"], f"two_ranks/{part}/{case}/{name}")


def check_siglip(numbers: Numbers) -> None:
    for case, facts in numbers.cases.items():
        for kind in ("siglip", "clip"):
            image, text = (numbers[f"in/{name}"].clone().requires_grad_() for name in ("image", "text"))
            log_scale, bias = (numbers[f"{case}/{name}"].clone().requires_grad_() for name in ("log_scale", "bias"))
            if kind == "siglip":
                loss = sigmoid(image[None], text, log_scale.exp(), bias, ALONE)
            else:
                loss = contrastive.info_nce(image[None], text, log_scale.exp(), ALONE)
            close_loss(loss, facts[f"{kind}_loss"], f"{case}/{kind}")
            given = {"image": image, "text": text, "log_scale": log_scale, "bias": bias}
            names = [name for name in given if f"{case}/{kind}/grad/{name}" in numbers]
            for name, found in zip(names, torch.autograd.grad(loss.sum(), [given[name] for name in names])):
                close_gradient(found, numbers[f"{case}/{kind}/grad/{name}"], f"{case}/{kind}/{name}")


def check_siglip_on_ranks(numbers: Numbers) -> None:
    """Losses of 2 and 3 ranks, and their mean's gradients against one process's."""
    for case, facts in numbers.cases.items():
        scale, bias = numbers[f"{case}/log_scale"].exp(), numbers[f"{case}/bias"]
        for ranks, name in ((2, "2 ranks bidir"), (3, "3 ranks gather")):
            given = [numbers[f"in/{part}"].clone().requires_grad_() for part in ("image", "text")]

            def work(comm: Comm, given: list[Tensor] = given, ranks: int = ranks) -> Tensor:
                image, text = (tensor.chunk(ranks)[comm.rank] for tensor in given)
                return sigmoid(image[None], text, scale, bias, comm)  # noqa: B023  # called at once

            losses = run_threads(ranks, work)
            for ours, theirs in zip(losses, facts["two_or_three_ranks"][name]["loss_of_rank"], strict=True):
                close_loss(ours, theirs, f"{case}: {name}")
            found = torch.autograd.grad(torch.stack(losses).mean(), given)
            for part, gradient in zip(("image", "text"), found):
                close_gradient(gradient, numbers[f"{case}/siglip/grad/{part}"], f"{case}: {name}, {part}")


def in_the_teachers_space(numbers: Numbers, case: str, given: dict[str, Tensor]) -> list[Tensor]:
    """The student's embeddings as FD and ICL compare them, through the objective with the file's maps."""
    image, text = given["student_image"], given["student_text"]
    maps = {
        f"{ours}_map.{part}": f"w/{theirs}_proj.{part}"
        for ours, theirs in (("image", "visual"), ("text", "text"))
        for part in ("weight", "bias")
    }
    width = numbers[f"{case}/w/visual_proj.weight"].shape[0] if f"{case}/w/visual_proj.weight" in numbers else None
    made = clipkd.ClipKD(clipkd.ClipKDOptions(1.0, project_to=width), Sizes(1, 1, image.shape[1], 1, 1, 1, 1))
    features = Features(
        image_embeds=normalise(image)[None],
        text_embeds=normalise(text),
        image_projected=image[None],
        text_projected=text,
    )
    held = {name: given[theirs] for name, theirs in maps.items()} if width else {}

    class Mapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of = made

        def forward(self) -> tuple[Tensor, Tensor]:
            return self.of._in_the_teachers_space(features)

    images, texts = torch.func.functional_call(Mapped(), {f"of.{name}": leaf for name, leaf in held.items()}, ())
    return [images[0], texts]


def clipkd_losses(numbers: Numbers, case: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of one process. The teacher of 12 channels meets the student's embeddings through linear projections."""
    image, text = given["student_image"], given["student_text"]
    teacher = [numbers[f"{case}/in/teacher_{part}"] for part in ("image", "text")]
    own = (normalise(image), normalise(text))
    near = in_the_teachers_space(numbers, case, given)
    scale, theirs = given["log_scale"].exp(), numbers[f"{case}/in/teacher_scale"]
    raw = given["w/cross_logit_scale"]
    return {
        "task": contrastive.info_nce(own[0][None], own[1], scale, ALONE),
        "fd": clipkd.feature(near[0], teacher[0]) + clipkd.feature(near[1], teacher[1]),
        "icl": clipkd.interactive(near[0], near[1], teacher[0], teacher[1], raw, ALONE),
        "crd": clipkd.relation(own, (teacher[0], teacher[1]), scale, theirs, ALONE),
    }


def check_clipkd(numbers: Numbers) -> None:
    """FD, ICL (its scale as published, not exp'ed) and CRD, the sum that its authors train with, and the task."""
    for case, facts in numbers.cases.items():
        inputs = {name: f"{case}/in/{name}" for name in ("student_image", "student_text", "log_scale")}
        inputs |= {name.removeprefix(f"{case}/"): name for name in numbers.names(f"{case}/w/")}
        given = {name: numbers[theirs].clone().requires_grad_() for name, theirs in inputs.items()}
        for part, loss in clipkd_losses(numbers, case, given).items():
            close_loss(loss, facts["global_losses"][part], f"{case}: {part}")
            prefix = f"{case}/grad_{part}/"
            names = [name.removeprefix(prefix) for name in numbers.names(prefix)]
            leaves_of = [given[name] for name in names]
            found = torch.autograd.grad(loss.sum(), leaves_of, allow_unused=True, retain_graph=True)
            for name, gradient in zip(names, found):
                close_gradient(gradient, numbers[f"{prefix}{name}"], f"{case}: {part}, {name}")


def check_clipkd_on_two_ranks(numbers: Numbers) -> None:
    """The mean of the ranks' losses and its gradient are one process's (the release's are half of it)."""
    for case in numbers.cases:
        scale, theirs = numbers[f"{case}/in/log_scale"].exp(), numbers[f"{case}/in/teacher_scale"]
        teacher = [numbers[f"{case}/in/teacher_{part}"] for part in ("image", "text")]
        rows = [numbers[f"{case}/in/student_{part}"] for part in ("image", "text")]

        def crd(parts: list[Tensor], comm: Comm, *more: Any) -> Tensor:
            own = (normalise(parts[0]), normalise(parts[1]))
            taught = tuple(rows.chunk(comm.world_size)[comm.rank] for rows in teacher)  # noqa: B023
            return clipkd.relation(own, taught, scale, theirs, comm)  # type: ignore[arg-type]  # noqa: B023

        losses, gradients = on_two_ranks(rows, crd)
        close_loss(
            torch.tensor(losses).mean(), numbers.cases[case]["global_losses"]["crd"], f"{case}: crd of two ranks"
        )
        for part, gradient in zip(("image", "text"), gradients):
            close_gradient(gradient, numbers[f"{case}/grad_crd/student_{part}"], f"{case}: two ranks, {part}")


def check_feature_distillation(numbers: Numbers) -> None:
    """Smooth L1 between a linear map of the student's tokens and the teacher's, whitened: the patches' target."""
    names = ("in/student_tokens", "w/decoder.weight", "w/decoder.bias")
    given = leaves(numbers, list(names))
    target = patches.whitened(numbers["in/teacher_tokens"])
    close(target, numbers["out/whitened_target"], "out/whitened_target", rtol=1e-5)
    student, weight, bias = given.values()
    loss = patches.smooth_l1(student @ weight.T + bias, target)
    close_loss(loss, numbers.meta["loss"], "loss")
    for name, found in zip(names, torch.autograd.grad(loss, list(given.values()))):
        theirs = f"grad/{name.partition('/')[2]}"
        close_gradient(found, numbers[theirs], theirs)
