"""A second teacher that stays as it is: a finished model of ours, whose embeddings objectives read (distill.teacher).

Every rank holds it whole, in fp32. Shapes: V views, B samples, E the teacher's embedding.
"""

import torch
from torch import Tensor

from amclip_ds.errors import UserError
from amclip_ds.evaluate.source import build_towers, locate
from amclip_ds.model.amclip import by_view
from amclip_ds.model.config import ModelConfig
from amclip_ds.model.features import FROZEN_IMAGES, FROZEN_SCALE, FROZEN_TEXTS, StudentInputs


class FrozenTeacher:
    """Reads the student's own views, with their colour changes and without a mask, and the plain texts."""

    def __init__(self, source: str, student: ModelConfig, device: torch.device) -> None:
        """source: a run, or a checkpoint; of the two that it may hold, its teacher. Raises UserError."""
        try:
            located = locate(source)
            if located.config is None:
                raise UserError(f"{located.path} is an export for {located.kind}; name a run or a checkpoint of ours")
            self.towers = build_towers(located, located.weights[-1], device)
        except UserError as error:
            raise UserError(f"distill.teacher: {error}") from None
        text = located.config.model.text
        if (text.vocab_size, text.eos_token_id) != (student.text.vocab_size, student.text.eos_token_id):
            raise UserError(f"distill.teacher: {located.path} has another vocabulary than the student")
        if text.context_length < student.text.context_length:
            raise UserError(
                f"distill.teacher: {located.path} reads texts of {text.context_length} tokens, the student of"
                f" {student.text.context_length}; set model.text.context_length={text.context_length}"
            )
        if student.vision.image_size % self.towers.vision.patch_size:
            raise UserError(
                f"distill.teacher: the patches of {located.path} are {self.towers.vision.patch_size} pixels, which do"
                f" not divide model.vision.image_size={student.vision.image_size}"
            )
        self.embed_dim = located.config.model.embed_dim
        self.about = f"distill.teacher: the {located.weights[-1]} of {located.path}, step {located.step}, frozen"

    @torch.no_grad()
    def look(self, inputs: StudentInputs, token_ids: Tensor, micro: int) -> dict[str, Tensor]:
        """{FROZEN_IMAGES: [B, V, E], FROZEN_TEXTS: [B, E]}, fp32 rows of unit length, and FROZEN_SCALE: [B, 1], the
        teacher's logit scale, exp'ed; micro: samples at a time."""
        images = torch.stack(
            by_view(inputs.groups, [group.images.flatten(0, 1) for group in inputs.groups])
        )  # [V, B, ...]
        seen, read = [], []
        for start in range(0, images.shape[1], micro):
            piece = images[:, start : start + micro]
            rows = self.towers.embed_images(piece.flatten(0, 1)).unflatten(0, piece.shape[:2])
            seen.append(rows.transpose(0, 1))
            read.append(self.towers.embed_texts(token_ids[start : start + micro]))
        scale = self.towers.logit_scale.detach().float().exp().expand(images.shape[1], 1)
        return {FROZEN_IMAGES: torch.cat(seen), FROZEN_TEXTS: torch.cat(read), FROZEN_SCALE: scale}
