"""Models of other libraries behind the Encoder interface: what an export is worth when its own library runs it.

Shapes: B batch, E embedding, D width of the tower, T tokens.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from amclip_ds.data import photometric
from amclip_ds.errors import UserError
from amclip_ds.evaluate.encoder import resize_and_crop, resized_size


def open_library(path: Path, kind: str, weights: str, device: torch.device, preprocess: str = "ours") -> "Library":
    """kind: open_clip | hf | timm | onnx. preprocess: ours | library, whose pixels `preprocess` makes."""
    return BUILDERS[kind](path, weights, device, preprocess == "library")


class Library:
    """What they share: our pixels or the library's, unit vectors."""

    is_tower_alone = False
    """Whether there is no text tower, and the embedding is the tower's own feature."""
    say: Callable[[str], None] | None = None

    def __init__(self, weights: str, image_size: int, device: torch.device, own_pixels: bool) -> None:
        self.weights, self.image_size, self.device, self.own_pixels = weights, image_size, device, own_pixels

    def preprocess(self, image: Image.Image) -> Tensor:
        """Ours: uint8 [3, H, H]; the library's: float32 [3, H, H]."""
        return self.own_pixels_of(image) if self.own_pixels else resize_and_crop(image, self.image_size)

    @torch.no_grad()
    def image(self, images: Tensor) -> Tensor:
        """[B, 3, H, H] -> [B, E]."""
        return F.normalize(self.features(images), dim=-1)

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> [B, E]."""
        return F.normalize(self.embed_ids(self.tokenise(list(texts)).to(self.device)).float(), dim=-1)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, H] -> [B, E], for probes: the embedding before it is normalised."""
        images = images.to(self.device)
        pixels = photometric.normalise(images) if images.dtype == torch.uint8 else images
        return self.embed_pixels(pixels).float()

    def own_pixels_of(self, image: Image.Image) -> Tensor:
        """The library's preprocessing: float32 [3, H, H]."""
        raise NotImplementedError

    def crops_as_we_do(self, image: Image.Image) -> bool:
        """Whether the library's centre crop takes the same pixels of the resized image as ours."""
        return True

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, H] -> embeddings [B, E]."""
        raise NotImplementedError

    def tokenise(self, texts: list[str]) -> Tensor:
        """The library's token ids [B, T]."""
        raise UserError(f"--task: {type(self).__name__} has no text tower; linear_probe and knn need none")

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] -> embeddings [B, E]."""
        raise NotImplementedError

    def logit_scale(self) -> float:
        """exp(logit_scale) as the library holds it."""
        return float(self.model.logit_scale.detach().float().exp())

    model: Any


class OpenClipModel(Library):
    """A folder that open_clip loads through `local-dir:`."""

    def __init__(self, path: Path, weights: str, device: torch.device, own_pixels: bool = False) -> None:
        import open_clip

        name = f"local-dir:{path}"
        self.model, self.transform = open_clip.create_model_from_pretrained(name, device=device, precision="fp32")
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)
        size = self.model.visual.image_size
        super().__init__(weights, size[0] if isinstance(size, tuple | list) else size, device, own_pixels)

    def own_pixels_of(self, image: Image.Image) -> Tensor:
        return self.transform(image)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def tokenise(self, texts: list[str]) -> Tensor:
        return self.tokenizer(texts)

    def embed_ids(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids)


class HuggingFaceModel(Library):
    """A folder for AutoModel.from_pretrained: a CLIPModel or a VisionTextDualEncoderModel."""

    def __init__(self, path: Path, weights: str, device: torch.device, own_pixels: bool = False) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.model, report = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        wrong = sorted(map(str, [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]))
        if wrong:
            raise UserError(f"{path}: transformers finds no place, or no weight, for {', '.join(wrong[:4])}")
        self.model.to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.processor = AutoImageProcessor.from_pretrained(path)
        super().__init__(weights, self.model.config.vision_config.image_size, device, own_pixels)

    def own_pixels_of(self, image: Image.Image) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]

    def crops_as_we_do(self, image: Image.Image) -> bool:
        """It rounds half a pixel down, torchvision to the even number."""
        sides = resized_size(image.size, self.image_size)
        return all(round((side - self.image_size) / 2) == (side - self.image_size) // 2 for side in sides)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixel_values=pixels))

    def tokenise(self, texts: list[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        batch = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return batch["input_ids"]

    def embed_ids(self, ids: Tensor) -> Tensor:
        """What follows the first end token is masked, as the tokenizer's own mask does."""
        end = (ids == self.model.config.text_config.eos_token_id).int()
        mask = (end.cumsum(-1) - end == 0).long()
        return _pooled(self.model.get_text_features(input_ids=ids, attention_mask=mask))


def _pooled(output: Any) -> Tensor:
    """transformers 4 returns the features, 5 an output that holds them."""
    return output if isinstance(output, Tensor) else output.pooler_output


class TimmModel(Library):
    """A folder that timm loads through `local-dir:`: the vision tower alone."""

    is_tower_alone = True

    def __init__(self, path: Path, weights: str, device: torch.device, own_pixels: bool = False) -> None:
        import timm
        from timm.data import create_transform, resolve_model_data_config

        self.model = timm.create_model(f"local-dir:{path}", pretrained=True).to(device).eval()
        facts = resolve_model_data_config(self.model)
        self.transform: Any = create_transform(**facts, is_training=False)
        super().__init__(weights, facts["input_size"][-1], device, own_pixels)

    def own_pixels_of(self, image: Image.Image) -> Tensor:
        return self.transform(image)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return self.model(pixels)


ONNX_FACTS = "clip_onnx.json"  # what lies beside image.onnx and text.onnx, and the input of each
ONNX_INPUTS = {"image": "pixel_values", "text": "input_ids"}


class OnnxModel(Library):
    """A folder of ONNX graphs, run by onnxruntime; the preprocessing that it describes is ours."""

    def __init__(self, path: Path, weights: str, device: torch.device, own_pixels: bool = False) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f"{path}: onnxruntime runs it; pip install 'amclip_ds[onnx]'") from None
        from tokenizers import Tokenizer

        self.facts = json.loads((path / ONNX_FACTS).read_text())
        usable = onnxruntime.get_available_providers()
        wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
        providers = [name for name in [*wanted, "CPUExecutionProvider"] if name in usable]
        self._image, self._text = (
            onnxruntime.InferenceSession(path / f"{name}.onnx", providers=providers) for name in ONNX_INPUTS
        )
        self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self.tokenizer.enable_truncation(self.facts["context_length"])
        self.tokenizer.enable_padding(length=self.facts["context_length"], pad_id=self.facts["eos_token_id"])
        super().__init__(weights, self.facts["image_size"], torch.device("cpu"), own_pixels)

    def own_pixels_of(self, image: Image.Image) -> Tensor:
        return photometric.normalise(resize_and_crop(image, self.image_size))

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return torch.from_numpy(self._image.run(None, {ONNX_INPUTS["image"]: pixels.numpy()})[0])

    def tokenise(self, texts: list[str]) -> Tensor:
        return torch.tensor([encoding.ids for encoding in self.tokenizer.encode_batch(texts)])

    def embed_ids(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self._text.run(None, {ONNX_INPUTS["text"]: ids.numpy()})[0])

    def logit_scale(self) -> float:
        return self.facts["logit_scale"]


BUILDERS: dict[str, Any] = {
    "open_clip": OpenClipModel, "hf": HuggingFaceModel, "timm": TimmModel, "onnx": OnnxModel,
}  # fmt: skip
