"""A causal transformer layer under the names that CLIP's text towers have in transformers' files.

transformers' own class would do, but importing it takes each rank half of a run's imports: docs/results/start-time.md.
Shapes: B batch, T tokens, D width, H heads, d width of a head.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclip_ds.model.config import TextConfig

EPSILON = 1e-5


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x), CLIP's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class CausalAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.scale = self.head_dim**-0.5
        self.k_proj = nn.Linear(width, width)  # parameters' order is that of a checkpoint's flat buffers: keep it
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def heads_of(self, x_BTD: Tensor) -> Tensor:
        """[B, T, H * d] -> [B, H, T, d]"""
        return x_BTD.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (self.heads_of(project(x_BTD)) for project in (self.q_proj, self.k_proj, self.v_proj))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class TextLayer(nn.Module):
    """Attention and MLP, each after a norm and beside a residual: [B, T, D] -> [B, T, D]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        inner = int(config.width * config.mlp_ratio)
        self.self_attn = CausalAttention(config.width, config.heads)
        self.layer_norm1 = nn.LayerNorm(config.width, eps=EPSILON)
        activation = QuickGelu() if config.activation == "quick_gelu" else nn.GELU()
        first, second = nn.Linear(config.width, inner), nn.Linear(inner, config.width)
        self.mlp = nn.Sequential(OrderedDict(fc1=first, activation=activation, fc2=second))
        self.layer_norm2 = nn.LayerNorm(config.width, eps=EPSILON)

    def forward(self, x_BTD: Tensor, end_B: Tensor | None = None) -> Tensor:
        """end_B: the one token of each text whose output is asked for, [B, D]; None: all."""
        if end_B is not None:
            return self._at(x_BTD, end_B)
        x_BTD = x_BTD + self.self_attn(self.layer_norm1(x_BTD))
        return x_BTD + self.mlp(self.layer_norm2(x_BTD))

    def _at(self, x_BTD: Tensor, end_B: Tensor) -> Tensor:
        """Its query, keys and values of all that it sees, an MLP of one. Every submodule is called."""
        attn = self.self_attn
        B, T, D = x_BTD.shape
        rows = torch.arange(B, device=x_BTD.device)
        normed = self.layer_norm1(x_BTD)
        q = attn.heads_of(attn.q_proj(normed[rows, end_B])[:, None])
        k, v = attn.heads_of(attn.k_proj(normed)), attn.heads_of(attn.v_proj(normed))
        seen = torch.arange(T, device=x_BTD.device) <= end_B[:, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None], scale=attn.scale)
        x_BD = x_BTD[rows, end_B] + attn.out_proj(attended.transpose(1, 2).reshape(B, D))
        return x_BD + self.mlp(self.layer_norm2(x_BD))
