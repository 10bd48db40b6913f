"""From a mask's priorities to the tokens that stay, and the module that removes the others.

Shapes: B rows (views x samples), N patches, K kept, U units (blocks of unit x unit patches), D width, p a patch's side.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from amclip_ds.errors import UserError, name_of
from amclip_ds.host_copies import taken
from amclip_ds.masks import MASKS, NONE, Mask, MaskConfig, MaskInputs, needs_of, options_of
from amclip_ds.masks.units import num_kept_units, num_units


class Selection(NamedTuple):
    """How the tokens of some views are chosen, as far as it is known before the tower has seen them.

    A tuple, so that ZeRO-3 finds its tensors.
    """

    config: MaskConfig
    inputs: MaskInputs
    """without patches and pixels, which the tower adds"""
    views: tuple[int, ...] = (0,)
    """which of the views that the tower takes together these are"""

    def part(self, samples: slice) -> "Selection":
        """The selection of some samples, all their views."""
        by_row = {
            name: value for name, value in self.inputs._asdict().items() if isinstance(value, Tensor) and value.dim()
        }
        views = (self.inputs.num_views, -1)
        rows: dict[str, Any] = {
            name: value.unflatten(0, views)[:, samples].flatten(0, 1) for name, value in by_row.items()
        }
        return self._replace(inputs=self.inputs._replace(**rows))

    @property
    def needs(self) -> frozenset[str]:
        """The fields of MaskInputs that the mask reads."""
        return needs_of(self.config)

    @torch.no_grad()
    def keep_indices(self, patches_BND: Tensor | None, images: Tensor) -> Tensor | None:
        """The tokens that stay, [B, K]; None: all. images: [B, 3, H, W] as the tower sees them.

        patches_BND: may be None for a mask that does not need them.
        """
        if self.config.strategy == NONE:
            return None
        needs = self.needs
        given: dict[str, Any] = {}
        if "patches" in needs:
            assert patches_BND is not None
            given["patches"] = patches_BND.detach()
        if "pixels" in needs:
            given["pixels"] = pixels_of(images, self.inputs.grid)
        return select(self.config, self.inputs._replace(**given))


def choose(
    selections: tuple[Selection, ...], num_views: int, patches_BND: Tensor | None, images: Tensor
) -> Tensor | None:
    """The tokens that stay of views that keep equally many, [B, K]; None: all. The rows are num_views x samples.

    Each selection chooses for its own views; together they are all views. patches_BND: None where no mask needs them.
    """
    if len(selections) == 1:
        return selections[0].keep_indices(patches_BND, images)
    found: dict[int, Tensor] = {}
    tokens = torch.arange(selections[0].inputs.grid ** 2, device=images.device)
    for selection in selections:
        places = selection.views
        pictures, patches = (
            None if rows is None else taken(rows.unflatten(0, (num_views, -1)), places).flatten(0, 1)
            for rows in (images, patches_BND)
        )
        assert pictures is not None
        kept = selection.keep_indices(patches, pictures)
        if kept is None:
            kept = tokens.expand(len(pictures), -1)
        found |= dict(zip(places, kept.unflatten(0, (len(places), -1))))
    return torch.cat([found[view] for view in range(num_views)])


def select(config: MaskConfig, inputs: MaskInputs) -> Tensor | None:
    """The tokens that stay, [B, K] ascending int64, K the same for every row; None where everything stays.

    Equal priorities: the first unit wins, so that the choice is the same on every machine. Raises UserError for a mask
    that gives something else than one number a unit.
    """
    if config.strategy == NONE:
        return None
    mask = MASKS[config.strategy]
    priority = mask.priority(inputs, options_of(config))
    units = num_units(inputs.grid, config.unit)
    check_priority(mask, priority, units, inputs)
    kept = num_kept_units(units, config.keep_ratio)
    order = priority.sort(dim=-1, descending=True, stable=True).indices
    chosen = consecutive(order, inputs.num_views, kept) if mask.disjoint else order[..., :kept]
    return tokens_of_units(chosen, inputs.grid, config.unit).sort(dim=-1).values


def consecutive(order_BU: Tensor, num_views: int, kept: int) -> Tensor:
    """[B, kept]: the first view's first `kept` of its order, the second view's next, and so on."""
    by_view = order_BU.unflatten(0, (num_views, -1)).unbind(0)
    return torch.cat([order[:, view * kept : (view + 1) * kept] for view, order in enumerate(by_view)])


def check_priority(mask: Mask, priority: Any, units: int, inputs: MaskInputs) -> None:
    """Raises UserError for something else than one number a unit; of a mask that is not ours also for a NaN, which no
    order has a place for, unless what the mask was given is not finite itself."""
    who = f"mask {name_of(mask.priority)}"
    if not isinstance(priority, Tensor):
        raise UserError(f"{who} gave a {type(priority).__name__}, not a tensor")
    given = [value for value in inputs if isinstance(value, Tensor)]
    rows = next((value.shape[0] for value in given if value.dim()), priority.shape[0] if priority.dim() else 1)
    if priority.shape != (rows, units):
        raise UserError(f"{who} gave numbers of shape {list(priority.shape)}; one a unit is needed, [{rows}, {units}]")
    if priority.dtype == torch.bool or priority.is_complex():
        raise UserError(f"{who} gave {priority.dtype}; real numbers are needed (.float())")
    if given and priority.device != given[0].device:
        raise UserError(f"{who} gave numbers on {priority.device}; its inputs are on {given[0].device}")
    is_ours = name_of(mask.priority).startswith("amclip_ds.")
    if not is_ours and priority.isnan().any() and all(value.isfinite().all() for value in given):
        raise UserError(f"{who} gave NaN for finite inputs; every unit needs a number")


def tokens_of_units(units: Tensor, grid: int, unit: int) -> Tensor:
    """The tokens of the given units: [..., k] -> [..., k * unit^2], in no particular order."""
    side = grid // unit
    corner = (units // side) * unit * grid + (units % side) * unit
    within = torch.arange(unit, device=units.device)
    offsets = (within[:, None] * grid + within[None, :]).flatten()
    return (corner[..., None] + offsets).flatten(-2)


def pixels_of(images: Tensor, grid: int) -> Tensor:
    """[B, 3, H, W] -> [B, N, p * p * 3] fp32: each patch's pixels row by row, the channel fastest."""
    B, channels, height, _ = images.shape
    patch = height // grid
    cut = images.float().reshape(B, channels, grid, patch, grid, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(B, grid * grid, patch * patch * channels)


def gather_tokens(x_BND: Tensor, keep_indices_BK: Tensor) -> Tensor:
    """x_BND at keep_indices_BK: [B, K, D]."""
    return x_BND.gather(1, keep_indices_BK[..., None].expand(-1, -1, x_BND.shape[-1]))


def keep_tokens(x_BND: Tensor, keep_indices_BK: Tensor | None) -> Tensor:
    """[B, N, D] -> [B, K, D]: removed tokens vanish, there is no mask token; without keep_indices everything stays."""
    return x_BND if keep_indices_BK is None else gather_tokens(x_BND, keep_indices_BK)
