"""The last block of the vision tower, computed for the class token alone: its query, keys and values of all, its MLP.

Every submodule is called (never its weight read from outside), so that ZeRO-3 can gather it.
Shapes: B batch, T tokens, D width, H heads, d width of a head.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from amclip_ds.model.scoring import row_of


class QueryOfFirst(nn.Linear):
    """The `qkv` of a timm attention, whose query can be asked of the first token alone."""

    @classmethod
    def become(cls, qkv: nn.Module) -> None:
        """Gives the layer this forward in place: parameters and their names stay."""
        assert type(qkv) is nn.Linear
        qkv.__class__ = cls

    def forward(self, x_BTD: Tensor, of_first: bool = False) -> Any:
        """[B, T, D] -> [B, T, 3 * H * d]; of_first: the query [B, 1, H * d], and keys and values [B, T, 2 * H * d]."""
        if not of_first:
            return super().forward(x_BTD)
        width = self.out_features // 3
        query, others = (None, None) if self.bias is None else (self.bias[:width], self.bias[width:])
        return F.linear(x_BTD[:, :1], self.weight[:width], query), F.linear(x_BTD, self.weight[width:], others)


def run_block_for_cls(block: Any, x_BTD: Tensor, with_row: bool = False) -> tuple[Tensor, Tensor | None]:
    """A timm Block's output at token 0, [B, 1, D]; with_row: also its attention, summed over the heads [B, T] fp32."""
    attn = block.attn
    B, T, _ = x_BTD.shape
    q, kv = attn.qkv(block.norm1(x_BTD), of_first=True)
    q = q.view(B, 1, attn.num_heads, attn.head_dim).transpose(1, 2)
    k, v = kv.view(B, T, 2, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, 1, -1)
    row = None
    if with_row:
        row = row_of(q, k, attn.scale)
    x_B1D = x_BTD[:, :1] + block.ls1(attn.proj(attended))
    return x_B1D + block.ls2(block.mlp(block.norm2(x_B1D))), row
