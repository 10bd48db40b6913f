"""A timm Block of which all is asked through its own call: ZeRO-3 fetches it whole, a compiler takes it.

timm is imported here: whoever needs no model does not import this.
"""

from typing import Any

from timm.models.vision_transformer import Block
from torch import Tensor

from amclip_ds.model.pooled import run_block_for_cls
from amclip_ds.model.scoring import run_block_with_cls_row


class VisionBlock(Block):
    """Shapes: B batch, T tokens, D width."""

    @classmethod
    def become(cls, block: Any) -> None:
        """Gives the block this forward in place: parameters and their names stay."""
        assert type(block) is Block
        block.__class__ = cls

    def forward(  # type: ignore[override]
        self, x_BTD: Tensor, with_row: bool = False, cls_only: bool = False
    ) -> Any:
        """[B, T, D] -> [B, T, D]; cls_only: its token 0 alone, [B, 1, D]; with_row: also the class token's attention,
        summed over the heads [B, T] fp32."""
        if cls_only:
            x_B1D, row = run_block_for_cls(self, x_BTD, with_row)
            return (x_B1D, row) if with_row else x_B1D
        return run_block_with_cls_row(self, x_BTD) if with_row else super().forward(x_BTD)
