"""Models of other libraries behind the Encoder interface: what an export is worth when its own library runs it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from amclip_ds.data import photometric
from amclip_ds.errors import UserError
from amclip_ds.evaluate.encoder import Encoder, resize_and_crop


def open_library(path: Path, kind: str, weights: str, device: torch.device, preprocess: str = "ours") -> Encoder:
    """kind: open_clip | hf | timm. preprocess: ours | library. Raises UserError for a folder the library refuses."""
    return BUILDERS[kind](path, weights, device, preprocess == "library")


class _Library:
    """What the three share: our pixels or the library's, unit vectors."""

    def __init__(self, weights: str, image_size: int, device: torch.device, own_pixels: bool) -> None:
        self.weights, self.image_size, self.device, self.own_pixels = weights, image_size, device, own_pixels

    def preprocess(self, image: Image.Image) -> Tensor:
        """Ours: uint8 [3, H, H]; the library's: float32 [3, H, H]."""
        return self._pixels(image) if self.own_pixels else resize_and_crop(image, self.image_size)

    @torch.no_grad()
    def image(self, images: Tensor) -> Tensor:
        """[B, 3, H, H] -> [B, E]."""
        return F.normalize(self._image(self._ready(images)).float(), dim=-1)

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> [B, E]."""
        return F.normalize(self._text(list(texts)).float(), dim=-1)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, H] -> [B, D], for probes: the embedding before it is normalised."""
        return self._image(self._ready(images)).float()

    def _ready(self, images: Tensor) -> Tensor:
        images = images.to(self.device)
        return photometric.normalise(images) if images.dtype == torch.uint8 else images

    def _pixels(self, image: Image.Image) -> Tensor:
        raise NotImplementedError

    def _image(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def _text(self, texts: list[str]) -> Tensor:
        raise UserError(f"--task: a {type(self).__name__} has no text tower; linear_probe and knn need none")


class OpenClipEncoder(_Library):
    """A folder that open_clip loads through `local-dir:`."""

    def __init__(self, path: Path, weights: str, device: torch.device, own_pixels: bool = False) -> None:
        import open_clip

        name = f"local-dir:{path}"
        self.model, self.transform = open_clip.create_model_from_pretrained(name, device=device, precision="fp32")
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)
        size = self.model.visual.image_size
        super().__init__(weights, size[0] if isinstance(size, tuple | list) else size, device, own_pixels)

    def _pixels(self, image: Image.Image) -> Tensor:
        return self.transform(image)

    def _image(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images)

    def _text(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(self.device))


class HuggingFaceEncoder(_Library):
    """A folder for AutoModel.from_pretrained: a CLIPModel or a VisionTextDualEncoderModel."""

    def __init__(self, path: Path, weights: str, device: torch.device, own_pixels: bool = False) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.model: Any = AutoModel.from_pretrained(path, dtype=torch.float32).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.processor = AutoImageProcessor.from_pretrained(path)
        super().__init__(weights, self.model.config.vision_config.image_size, device, own_pixels)

    def _pixels(self, image: Image.Image) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]

    def _image(self, images: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixel_values=images))

    def _text(self, texts: list[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        batch = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids, mask = batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)
        return _pooled(self.model.get_text_features(input_ids=ids, attention_mask=mask))


def _pooled(output: Any) -> Tensor:
    """transformers 4 returns the features, 5 an output that holds them."""
    return output if isinstance(output, Tensor) else output.pooler_output


class TimmEncoder(_Library):
    """A folder that timm loads through `local-dir:`: the vision tower alone."""

    def __init__(self, path: Path, weights: str, device: torch.device, own_pixels: bool = False) -> None:
        import timm
        from timm.data import create_transform, resolve_model_data_config

        self.model = timm.create_model(f"local-dir:{path}", pretrained=True).to(device).eval()
        facts = resolve_model_data_config(self.model)
        self.transform: Any = create_transform(**facts, is_training=False)
        super().__init__(weights, facts["input_size"][-1], device, own_pixels)

    def _pixels(self, image: Image.Image) -> Tensor:
        return self.transform(image)

    def _image(self, images: Tensor) -> Tensor:
        return self.model(images)


BUILDERS: dict[str, Any] = {"open_clip": OpenClipEncoder, "hf": HuggingFaceEncoder, "timm": TimmEncoder}
