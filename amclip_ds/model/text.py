"""The text tower: CLIP's causal text transformer under transformers' names, pooled at the first end token.

Shapes: B batch, T tokens, W width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amclip_ds.host_copies import upload
from amclip_ds.model.config import TextConfig
from amclip_ds.model.savings import Savings
from amclip_ds.model.text_groups import TextGroup, groups_of
from amclip_ds.model.text_layer import EPSILON, TextLayer


class TextTower(nn.Module):
    """Computes what transformers' CLIPTextModel does, and its state dict is that one's."""

    compiled_parts = ("pooled",)

    embeddings: Any
    encoder: Any

    def __init__(self, config: TextConfig, savings: Savings | None = None) -> None:
        super().__init__()
        self.savings = savings or Savings()
        self.eos_token_id = config.eos_token_id
        self.checkpoint_every = config.checkpoint_every
        self.width = config.width
        self.fixed_shapes = False  # engine.compile sets it: groups of texts differ in their length alone
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(config.vocab_size, config.width),
                "position_embedding": nn.Embedding(config.context_length, config.width),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(TextLayer(config) for _ in range(config.depth))})
        self.final_layer_norm = nn.LayerNorm(config.width, eps=EPSILON)

    def forward(self, token_ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """token_ids [B, T] int64, T at most the context length -> feature at the first end token, normed [B, W].

        Attention is causal, so the tokens after the end token change nothing: texts may be trimmed to the longest of a
        batch. A row without an end token is the caller's mistake and is read at its first place.
        lengths: tokens of each text up to its end token, so that short texts can be taken apart from long ones.
        """
        groups = self.groups(lengths, token_ids.shape[1])
        # Contiguous: what is compiled for a length must not depend on how wide the batch was.
        if len(groups) < 2:
            return self.pooled(token_ids[:, : groups[0].length].contiguous() if groups else token_ids)
        order = upload(torch.tensor([row for group in groups for row in group.rows]), token_ids.device)
        parts = token_ids[order].split([len(group.rows) for group in groups])
        found = [self.pooled(part[:, : group.length].contiguous()) for part, group in zip(parts, groups)]
        return torch.cat(found)[order.argsort()]

    def groups(self, lengths: Sequence[int] | None, longest: int) -> list[TextGroup]:
        """Which texts of a batch go together; none: all of them, `longest` tokens each."""
        if lengths is None or not self.savings.texts_by_length:
            return []
        return groups_of(lengths, longest, self.fixed_shapes)

    def pooled(self, token_ids: Tensor) -> Tensor:
        """[B, T] -> feature at the first end token, normed [B, W]."""
        end = self._end(token_ids)
        if not self.savings.last_block:
            return self.final_layer_norm(_at(self._run_blocks(token_ids), end))
        x = self._run_blocks(token_ids, leave_last=True)
        last = self.encoder.layers[-1]
        if self._is_recomputed(len(self.encoder.layers) - 1):
            x_end = checkpoint(last, x, end, use_reentrant=False, preserve_rng_state=False)
        else:
            x_end = last(x, end)
        return self.final_layer_norm(x_end)

    def encode(self, token_ids: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """token_ids [B, T] -> every token after the last norm [B, T, W], and the feature at the first end token.

        hidden: [W], read at the places whose id is negative.
        """
        tokens = self.final_layer_norm(self._run_blocks(token_ids, hidden=hidden))
        return tokens, _at(tokens, self._end(token_ids))

    def vocabulary(self, device: torch.device) -> Tensor:
        """The embeddings of all tokens that there are, [Y, W], by the layer's forward: ZeRO-3 gathers them there."""
        embedding = self.embeddings.token_embedding
        return embedding(torch.arange(embedding.num_embeddings, device=device))

    def _run_blocks(self, token_ids: Tensor, leave_last: bool = False, hidden: Tensor | None = None) -> Tensor:
        T = token_ids.shape[1]
        context_length = self.embeddings.position_embedding.num_embeddings
        if context_length < T:
            raise ValueError(f"model.text.context_length: a text of {T} tokens is longer than {context_length}")
        positions = torch.arange(T, device=token_ids.device)
        words = self.embeddings.token_embedding(token_ids if hidden is None else token_ids.clamp(min=0))
        if hidden is not None:
            words = torch.where(token_ids[..., None] < 0, hidden, words)
        x = words + self.embeddings.position_embedding(positions)
        for index, layer in enumerate(self.encoder.layers[: -1 if leave_last else None]):
            if self._is_recomputed(index):
                x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x)
        return x

    def _is_recomputed(self, index: int) -> bool:
        return bool(self.checkpoint_every) and index % self.checkpoint_every == 0 and torch.is_grad_enabled()

    def _end(self, token_ids: Tensor) -> Tensor:
        return (token_ids == self.eos_token_id).int().argmax(dim=-1)


def _at(x: Tensor, place: Tensor) -> Tensor:
    """x [B, T, W] at one place of each row: [B, W]."""
    return x[torch.arange(x.shape[0], device=x.device), place]
