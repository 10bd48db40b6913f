"""DetailCLIP's objective against two published steps in a row: what stays, losses, gradients, logits, pixels, centres.

The encoders are replaced by the file's tokens; the head's average is moved before each step, as published.
"""

from typing import Any

import torch
from torch import Tensor, nn

from amclip_ds.masks import MaskConfig, MaskInputs
from amclip_ds.masks.selection import gather_tokens, pixels_of, select
from amclip_ds.masks.units import pool
from amclip_ds.model.amclip import Sizes
from amclip_ds.model.config import DetailCLIPOptions
from amclip_ds.model.features import Features, Seen
from amclip_ds.model.towers import normalise
from amclip_ds.objectives import contrastive
from amclip_ds.objectives.detailclip import DetailCLIP
from amclip_ds.objectives.patches import positions
from tests.parity.numbers import ALONE, GRADIENT, Numbers, close, close_gradient, close_loss, same

GRID, EPOCHS = 14, 25
TERMS = {"detail_pixel": "reconst_loss", "detail_patch": "ibot_patch_loss", "detail_cls": "ibot_cls_loss"}


def built(numbers: Numbers) -> tuple[DetailCLIP, dict[str, str]]:
    """The objective with the file's weights; our name -> theirs."""
    width, hidden, bottleneck, prototypes = 16, 20, 12, numbers.meta["sizes"]["head"].split()[-2]
    options = DetailCLIPOptions(
        1.0,
        decoder_heads=numbers.meta["sizes"]["decoder_heads"],
        hidden_dim=hidden,
        bottleneck_dim=bottleneck,
        prototypes=int(prototypes),
    )
    made = DetailCLIP(options, Sizes(width, 12, numbers.meta["sizes"]["embed"], GRID, 16, 16, 100))
    theirs = {name: theirs_of(name) for name, _ in made.named_parameters()}
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(numbers[f"w/{theirs[name]}"])
    assert (numbers["w/ibot_head.last_layer.weight_g"] == 1).all()
    return made, theirs


def theirs_of(name: str) -> str:
    for ours, other in (
        ("decoder.embed", "decoder_embed"),
        ("decoder.mask_token", "mask_token"),
        ("decoder.blocks", "decoder_blocks"),
        ("decoder.norm", "decoder_norm"),
        ("pixels.", "reconstruction_pred."),
        ("head.mlp", "ibot_head.mlp"),
    ):
        if name.startswith(ours):
            return other + name.removeprefix(ours)
    assert name == "head.prototypes.weight"
    return "ibot_head.last_layer.weight_v"


def averaged_head(made: DetailCLIP, numbers: Numbers) -> nn.ModuleDict:
    head = type(made.head)(16, 20, 12, made.options.prototypes)
    head.load_state_dict(
        {
            name: numbers[f"teacher_w_before/ibot_head_e.{of}"]
            for name, of in ((name, theirs_of(f"head.{name}").removeprefix("ibot_head.")) for name in head.state_dict())
        }
    )
    assert (numbers["teacher_w_before/ibot_head_e.last_layer.weight_g"] == 1).all()
    return nn.ModuleDict({"head": head}).requires_grad_(False)


def images_of(numbers: Numbers, step: int) -> dict[str, Tensor]:
    """Drawn as the json says, and checked by its sums."""
    g = torch.Generator().manual_seed(5000 * (step + 1) + numbers.seed)
    found = {view: torch.randn(2, 3, 224, 224, generator=g) for view in "uv"}
    for view, (plain, squared) in numbers.meta["steps"][step]["image_sums"].items():
        image = found[view].double()
        assert abs(float(image.sum()) - plain) < 1e-6 and abs(float(image.square().sum()) - squared) < 1e-6
    return found


def kept_of(numbers: Numbers, step: int, view: str) -> Tensor:
    """By our attentive mask, of the teacher's scores of that view."""
    units = pool(numbers[f"step{step}/in/attention_{view}"], GRID, 2)
    keep = select(MaskConfig("attentive", 0.5, 2), MaskInputs(GRID, 2, 1, scores=units))
    assert keep is not None
    same(keep, numbers[f"step{step}/kept_{view}"], f"step{step}/kept_{view}")
    return keep


def check_steps(numbers: Numbers) -> None:
    made, theirs = built(numbers)
    copies = averaged_head(made, numbers)
    close(
        positions(GRID, torch.empty(1, 16), by_axis=True)[None],
        numbers["w/decoder_pos_embed"][:, 1:],
        "positions",
        atol=1e-6,
    )
    assert not numbers["w/decoder_pos_embed"][:, 0].any()
    for step, facts in enumerate(numbers.meta["steps"]):
        with torch.no_grad():
            for average, own in zip(copies["head"].parameters(), made.head.parameters(), strict=True):
                average.lerp_(own, 1 - facts["momentum"])
        check_step(numbers, step, made, theirs, copies)


def check_step(numbers: Numbers, step: int, made: DetailCLIP, theirs: dict[str, str], copies: nn.ModuleDict) -> None:
    facts, prefix = numbers.meta["steps"][step], f"step{step}/in/"
    given = {
        name: numbers[f"{prefix}{name}"].clone().requires_grad_()
        for name in ("student_tokens_u", "student_tokens_v", "student_cls_u", "student_cls_v", "text_embed")
    }
    images, keep = images_of(numbers, step), {view: kept_of(numbers, step, view) for view in "uv"}
    features = Features(
        cls=torch.stack([given["student_cls_u"], given["student_cls_v"]]),
        patches=tuple(gather_tokens(given[f"student_tokens_{view}"], keep[view]) for view in "uv"),
        keep_indices=tuple(keep.values()),
        pixels=tuple(pixels_of(images[view], GRID) for view in "uv"),
        progress=facts["epoch"] / EPOCHS,
    )
    seen = Seen(
        *(
            torch.stack([numbers[f"{prefix}teacher_{part}_{view}"] for view in "uv"], dim=1)
            for part in ("cls", "tokens")
        )
    )
    targets = made.observe(copies, seen, ALONE)
    terms = made.per_sample(features, targets) | made(features, targets, ALONE)
    check_losses(numbers, step, made, terms, given, theirs, facts["losses"])
    check_outputs(numbers, step, made, features, targets)
    with torch.no_grad():
        made.commit(ALONE)
    for ours, other in ((made.centre, "cls"), (made.patch_centre, "patch")):
        name = f"step{step}/out/center_{other}_after"
        close(ours, numbers[name].flatten(), name, rtol=GRADIENT)  # type: ignore[arg-type]


def check_losses(
    numbers: Numbers,
    step: int,
    made: DetailCLIP,
    terms: dict[str, Tensor],
    given: dict[str, Tensor],
    theirs: dict[str, str],
    losses: dict[str, float],
) -> None:
    projection, scale = (numbers[f"w/{name}"].clone().requires_grad_() for name in ("image_projection", "logit_scale"))
    views = torch.stack([normalise(given[f"student_cls_{view}"] @ projection) for view in "uv"])
    text = normalise(given["text_embed"])
    total = contrastive.info_nce(views, text, scale.exp(), ALONE)
    of_views = (losses["contra_loss_1"] + losses["contra_loss_2"]) / 2  # one alone is small: rounding of logits shows
    close_loss(total, of_views, "contra_loss")
    for ours, name in TERMS.items():
        close_loss(terms[ours], losses[name], name)
        total = total + made.weight_of(ours) * terms[ours]
    close_loss(total, losses["loss"], "loss")
    if step:
        return
    inputs = {f"in/{name}": tensor for name, tensor in given.items()}
    inputs |= {f"w/{theirs[name]}": parameter for name, parameter in made.named_parameters()}
    inputs |= {"w/image_projection": projection, "w/logit_scale": scale}
    of_term = {"grad_loss": total} | {f"grad_{name}": terms[ours] for ours, name in TERMS.items()}
    for part, loss in of_term.items():
        names = numbers.names(f"step0/{part}/")
        leaves = [inputs[name.removeprefix(f"step0/{part}/")] for name in names]
        for name, found in zip(names, torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)):
            check_gradient(found, numbers[name], name)


def check_gradient(found: Tensor | None, wanted: Tensor, name: str) -> None:
    if name.endswith("attn.qkv.bias") and found is not None:  # the keys' third is zero in exact arithmetic
        close(found.chunk(3)[1], torch.zeros(16), name, atol=GRADIENT * float(wanted.abs().max()))
        found, wanted = (torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (found, wanted))
    close_gradient(found, wanted, name)


def check_outputs(
    numbers: Numbers, step: int, made: DetailCLIP, features: Features, targets: tuple[Tensor, ...]
) -> None:
    """Logits of both sides, rows u then v, and pixels, of places that stay too."""
    inside, prototypes = targets
    logits = (inside @ prototypes[0].T).transpose(0, 1).flatten(0, 1)
    held: Any = zip(features.cls, features.patches, features.keep_indices)  # type: ignore[arg-type]
    decoded = [made.decoder.norm(made.decoder.tokens(*view)) for view in held]
    student = made.head.prototypes(made.head(torch.cat(decoded)[:, :8]))
    assert features.cls is not None
    found = {
        "teacher_cls": logits[:, 0],
        "teacher_patch_first8": logits[:, 1:9],
        "student_cls": made.head.prototypes(made.head(features.cls.flatten(0, 1))),
        "student_patch_first8": student,
        "pixels_first2": made.pixels(decoded[0][:, :2]),
    }
    for name, ours in found.items():
        theirs = numbers[f"step{step}/out/{name}"]
        close(ours, theirs, f"step{step}/out/{name}", rtol=GRADIENT)
