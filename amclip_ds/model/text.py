"""The text tower: transformers' CLIP text transformer, pooled at the first end token.

Shapes: B batch, T tokens, W width.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amclip_ds.model.config import TextConfig


class TextTower(nn.Module):
    """The modules of transformers' CLIPTextModel under their own names, with a forward that needs no mask tensor.

    Own forward, since CLIPTextEmbeddings reads its submodule's weight shape (empty under ZeRO-3 until it is called) and
    CLIPTextModel builds a mask where SDPA's is_causal is enough.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        from transformers.models.clip import CLIPTextConfig, CLIPTextModel

        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.width,
                intermediate_size=int(config.width * config.mlp_ratio),
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
                max_position_embeddings=config.context_length,
                hidden_act=config.activation,
                layer_norm_eps=1e-5,
                eos_token_id=config.eos_token_id,
                bos_token_id=None,
                pad_token_id=None,
                attn_implementation="sdpa",  # type: ignore[call-arg]  # of the base class
            )
        )
        self.eos_token_id = config.eos_token_id
        self.checkpoint_every = config.checkpoint_every
        self.width = config.width
        self.embeddings = clip.embeddings
        self.encoder = clip.encoder
        self.final_layer_norm = clip.final_layer_norm

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [B, T] int64, T at most the context length -> feature at the first end token, normed [B, W].

        Attention is causal, so the tokens after the end token change nothing: texts may be trimmed to the longest of a
        batch. A row without an end token is the caller's mistake and is read at its first place.
        """
        return self.final_layer_norm(self._at_end(self._run_blocks(token_ids), token_ids))

    def encode(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """token_ids [B, T] -> every token after the last norm [B, T, W], and the feature at the first end token."""
        tokens = self.final_layer_norm(self._run_blocks(token_ids))
        return tokens, self._at_end(tokens, token_ids)

    def _run_blocks(self, token_ids: Tensor) -> Tensor:
        T = token_ids.shape[1]
        context_length = self.embeddings.position_embedding.num_embeddings
        if context_length < T:
            raise ValueError(f"model.text.context_length: a text of {T} tokens is longer than {context_length}")
        positions = torch.arange(T, device=token_ids.device)
        x = self.embeddings.token_embedding(token_ids) + self.embeddings.position_embedding(positions)
        for index, layer in enumerate(self.encoder.layers):
            if self.checkpoint_every and index % self.checkpoint_every == 0 and torch.is_grad_enabled():
                x = checkpoint(layer, x, None, is_causal=True, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, None, is_causal=True)
        return x

    def _at_end(self, x: Tensor, token_ids: Tensor) -> Tensor:
        end = (token_ids == self.eos_token_id).int().argmax(dim=-1)
        return x[torch.arange(x.shape[0], device=x.device), end]
