"""Models of other libraries behind the Encoder interface: what an export is worth when its own library runs it.

A library never sees the folder. Its classes are built from values that export_folder.py has checked, with code of the
installed library alone, and take the tensors of safetensors files that fit: nothing of a stranger's is executed,
fetched, or believed.

Shapes: B batch, E embedding, D width of the tower, T tokens.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from amclip_ds import safetensors_header
from amclip_ds.data import photometric
from amclip_ds.errors import AmclipError, UserError, in_one_line
from amclip_ds.evaluate.encoder import resize_and_crop, resized_size
from amclip_ds.evaluate.export_folder import (
    MAX_VOCABULARY,
    ONNX_INPUTS,
    read_hugging_face,
    read_onnx,
    read_open_clip,
    read_own,
    read_timm,
    refuse_elsewhere,
)
from amclip_ds.evaluate.foreign_tokenizer import ForeignTokenizer
from amclip_ds.evaluate.onnx_graph import open_graph
from amclip_ds.model.weight_files import weight_files

OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
HF_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
TIMM_WEIGHTS = ("model.safetensors",)
SLACK = 1 << 20  # weights that a model may have beyond twice the file's: positions of a larger image


def open_library(path: Path, kind: str, weights: str, device: torch.device, preprocess: str = "ours") -> "Library":
    """kind: open_clip | hf | timm | onnx. preprocess: ours | library, whose pixels `preprocess` makes.

    Raises UserError for what may not be loaded, and for a model that does not give finite embeddings of one width;
    what the library raises is not caught.
    """
    library = BUILDERS[kind](path, weights, device, preprocess == "library")
    library.path = path
    library.try_out()
    return library


def fitting_files(folder: Path, names: Sequence[str], model: nn.Module) -> list[Path]:
    """The safetensors for a model that was built on `meta`, which costs no memory. Raises UserError.

    A config that asks for much more than the files hold is refused before the model is made.
    """
    files = weight_files(folder, names)
    held = sum(math.prod(entry.shape) for file in files for entry in safetensors_header.read(file).entries.values())
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if wanted > 2 * held + SLACK:
        raise UserError(f"{folder}: its config describes {wanted} weights, {files[0].name} holds {held}")
    return files


def _tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


class Library:
    """What they share: our pixels or the library's, unit vectors."""

    path: Path
    is_tower_alone = False
    """Whether there is no text tower, and the embedding is the tower's own feature."""
    say: Callable[[str], None] | None = None
    mean_std: tuple[Sequence[float], Sequence[float]] = (photometric.MEAN, photometric.STD)
    """of the pixels that it was trained on, by channel"""

    def __init__(self, weights: str, image_size: int, device: torch.device, use_library_preprocess: bool) -> None:
        self.weights, self.image_size, self.device, self.use_library_preprocess = (
            weights,
            image_size,
            device,
            use_library_preprocess,
        )

    def preprocess(self, image: Image.Image) -> Tensor:
        """Ours: uint8 [3, H, H]; the library's: float32 [3, H, H]."""
        return self.library_pixels(image) if self.use_library_preprocess else resize_and_crop(image, self.image_size)

    def try_out(self) -> None:
        """Two images and two texts. Raises UserError where what comes is no embedding."""
        made = [self.features(torch.zeros(2, 3, self.image_size, self.image_size, dtype=torch.uint8))]
        made += [] if self.is_tower_alone else [self.text(["a", "two words"])]
        widths = [tuple(rows.shape[1:]) for rows in made if rows.shape[0] == 2]
        if len(widths) != len(made) or len(set(widths)) != 1 or len(widths[0]) != 1:
            raise UserError(f"{self.path}: gives embeddings of the shapes {[list(rows.shape) for rows in made]}")
        if not all(bool(rows.isfinite().all()) for rows in made):
            raise UserError(f"{self.path}: gives embeddings that are not finite")

    @torch.no_grad()
    def image(self, images: Tensor, numbers: Sequence[int] = ()) -> Tensor:
        """[B, 3, H, H] -> [B, E]; no patch is removed."""
        return F.normalize(self.features(images), dim=-1)

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> [B, E]."""
        with self._blamed():
            return F.normalize(self.embed_ids(self.tokenise(list(texts)).to(self.device)).float(), dim=-1)

    @torch.no_grad()
    def features(self, images: Tensor, numbers: Sequence[int] = ()) -> Tensor:
        """[B, 3, H, H] -> [B, E], for probes: the embedding before it is normalised."""
        images = images.to(self.device)
        pixels = photometric.normalise(images) if images.dtype == torch.uint8 else images
        with self._blamed():
            return self.embed_pixels(pixels).float()

    @contextlib.contextmanager
    def _blamed(self) -> Iterator[None]:
        """What a library raises over a stranger's model is that model's fault."""
        try:
            yield
        except AmclipError:
            raise
        except Exception as error:
            reason = in_one_line(error, 300)
            raise UserError(f"{self.path}: the model fails: {type(error).__name__} {reason}") from None

    def library_pixels(self, image: Image.Image) -> Tensor:
        """The library's preprocessing: float32 [3, H, H]."""
        raise NotImplementedError

    def same_center_crop(self, image: Image.Image) -> bool:
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

    def __init__(self, path: Path, weights: str, device: torch.device, use_library_preprocess: bool = False) -> None:
        import open_clip
        from open_clip.tokenizer import SimpleTokenizer, get_clean_fn
        from open_clip.transform import PreprocessCfg, image_transform_v2

        facts = read_open_clip(path)
        kind = open_clip.CustomTextCLIP if facts.is_custom_text else open_clip.CLIP
        with torch.device("meta"):
            skeleton = kind(**copy.deepcopy(facts.model))
        file = fitting_files(path, OPEN_CLIP_WEIGHTS, skeleton)[0]
        self.model = kind(**facts.model)
        open_clip.factory.load_checkpoint(self.model, str(file), strict=True)
        self.model.to(device).eval()
        size = self.model.visual.image_size
        pixels = PreprocessCfg(**facts.preprocess | {"size": size})
        self.mean_std = (pixels.mean, pixels.std)
        self.transform = image_transform_v2(pixels, is_train=False)
        length = self.model.context_length
        self.tokenizer: Any
        if facts.has_tokenizer_file:
            clean = get_clean_fn(facts.tokenizer.get("clean", "whitespace"))
            encode = ForeignTokenizer(path / "tokenizer.json", length, _pad_id(path), self.model.vocab_size)
            self.tokenizer = lambda texts: encode([clean(text) for text in texts])
        else:
            self.tokenizer = SimpleTokenizer(context_length=length, **facts.tokenizer)
        super().__init__(weights, size[0] if isinstance(size, tuple | list) else size, device, use_library_preprocess)

    def library_pixels(self, image: Image.Image) -> Tensor:
        return self.transform(image)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def tokenise(self, texts: list[str]) -> Tensor:
        return self.tokenizer(texts)

    def embed_ids(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids)


class HuggingFaceModel(Library):
    """A folder for AutoModel.from_pretrained: a CLIPModel or a VisionTextDualEncoderModel."""

    def __init__(self, path: Path, weights: str, device: torch.device, use_library_preprocess: bool = False) -> None:
        import transformers as library

        facts = read_hugging_face(path)
        text = library.CLIPTextConfig(**facts.text)
        vision_kind = library.ViTConfig if facts.vision_type == "vit" else library.CLIPVisionConfig
        vision = vision_kind(**facts.vision)
        if facts.is_clip:
            kind: Any = library.CLIPModel
            towers: dict[str, Any] = {"vision_config": vision.to_dict(), "text_config": text.to_dict()}
            config: Any = library.CLIPConfig(**towers, **facts.model)
        else:
            kind = library.VisionTextDualEncoderModel
            config = library.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, **facts.model)
        with torch.device("meta"):
            skeleton = kind(copy.deepcopy(config))
        library.utils.logging.disable_progress_bar()  # of tensors that are in memory already
        self.model, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=_tensors(fitting_files(path, HF_WEIGHTS, skeleton)),
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        wrong = sorted(map(str, [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]))
        if wrong:
            raise UserError(f"{path}: transformers finds no place, or no weight, for {', '.join(wrong[:4])}")
        self.model.to(device).eval()
        pixels = dict(facts.pixels)
        name = pixels.pop("image_processor_type", pixels.pop("feature_extractor_type", "CLIPImageProcessor"))
        processor = library.ViTImageProcessor if name.startswith("ViT") else library.CLIPImageProcessor
        self.processor: Any = processor(**pixels)
        self.mean_std = (self.processor.image_mean, self.processor.image_std)
        config = self.model.config.text_config
        self.tokenizer = ForeignTokenizer(
            path / "tokenizer.json", config.max_position_embeddings, _pad_id(path), config.vocab_size
        )
        super().__init__(weights, self.model.config.vision_config.image_size, device, use_library_preprocess)

    def library_pixels(self, image: Image.Image) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]

    def same_center_crop(self, image: Image.Image) -> bool:
        """It rounds half a pixel down, torchvision to the even number."""
        sides = resized_size(image.size, self.image_size)
        return all(round((side - self.image_size) / 2) == (side - self.image_size) // 2 for side in sides)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixel_values=pixels))

    def tokenise(self, texts: list[str]) -> Tensor:
        return self.tokenizer(texts)

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

    def __init__(self, path: Path, weights: str, device: torch.device, use_library_preprocess: bool = False) -> None:
        import timm
        from timm.data import create_transform, resolve_model_data_config

        facts = read_timm(path)
        if not timm.is_model(facts.architecture):
            raise UserError(f"{path / 'config.json'}: architecture: timm has no {facts.architecture!r}")

        def make() -> Any:
            args: dict[str, Any] = copy.deepcopy(facts.model_args)
            return timm.create_model(
                facts.architecture, pretrained=False, pretrained_cfg=copy.deepcopy(facts.pixels), **args
            )

        with torch.device("meta"):
            skeleton = make()
        tensors = _tensors(fitting_files(path, TIMM_WEIGHTS, skeleton))
        self.model = make()
        self.model.load_state_dict(tensors, strict=True)
        self.model.to(device).eval()
        pixels = resolve_model_data_config(self.model)
        self.transform: Any = create_transform(**pixels, is_training=False)
        super().__init__(weights, pixels["input_size"][-1], device, use_library_preprocess)

    def library_pixels(self, image: Image.Image) -> Tensor:
        return self.transform(image)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return self.model(pixels)


class OnnxModel(Library):
    """A folder of ONNX graphs, run by onnxruntime; the preprocessing that it describes is ours."""

    def __init__(self, path: Path, weights: str, device: torch.device, use_library_preprocess: bool = False) -> None:
        self.facts = read_onnx(path)
        wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
        self._image, self._text = (open_graph(path / f"{name}.onnx", wanted) for name in ONNX_INPUTS)
        self.tokenizer = ForeignTokenizer(
            path / "tokenizer.json", self.facts["context_length"], self.facts["eos_token_id"], MAX_VOCABULARY
        )
        super().__init__(weights, self.facts["image_size"], torch.device("cpu"), use_library_preprocess)

    def library_pixels(self, image: Image.Image) -> Tensor:
        return photometric.normalise(resize_and_crop(image, self.image_size))

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return torch.from_numpy(self._image.run(None, {ONNX_INPUTS["image"]: pixels.numpy()})[0])

    def tokenise(self, texts: list[str]) -> Tensor:
        return self.tokenizer(texts)

    def embed_ids(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self._text.run(None, {ONNX_INPUTS["text"]: ids.numpy()})[0])

    def logit_scale(self) -> float:
        return self.facts["logit_scale"]


def _pad_id(folder: Path) -> int:
    """The id of the pad token that tokenizer_config.json names; 0 where it names none."""
    path = folder / "tokenizer_config.json"
    facts = read_own(path) if path.is_file() else {}
    refuse_elsewhere(path, facts)
    for side in ("padding_side", "truncation_side"):
        if facts.get(side, "right") != "right":
            raise UserError(f"{path}: {side}: {str(facts[side])[:40]!r} is not 'right'")
    pad = facts.get("pad_token")
    name = pad.get("content") if isinstance(pad, dict) else pad
    tokens = read_own(folder / "tokenizer.json")
    known = {token.get("content"): token.get("id") for token in tokens.get("added_tokens") or []}
    return int(known.get(name) or 0)


BUILDERS: dict[str, Any] = {"open_clip": OpenClipModel, "hf": HuggingFaceModel, "timm": TimmModel, "onnx": OnnxModel}
