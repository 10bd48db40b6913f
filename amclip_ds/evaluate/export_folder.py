"""What an export of another library says about itself, checked before that library sees any of it.

Each function reads one file of the folder and returns plain values of known keys, within bounds. The libraries then
build from these values alone: they never see the folder, so nothing in it can name code, a hub, or another file.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amclip_ds.data.photometric import MEAN, STD
from amclip_ds.errors import UserError
from amclip_ds.files import read_json
from amclip_ds.jsonl import is_number
from amclip_ds.model.weight_files import inside

MAX_PIXELS = 1024  # a side of an image
MAX_TOKENS = 4096  # patches of an image, or positions of a text
MAX_WIDTH, MAX_LAYERS, MAX_VOCABULARY = 16_384, 256, 2_000_000
ELSEWHERE = {
    "auto_map",
    "custom_pipelines",
    "trust_remote_code",
    "quantization_config",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "attn_implementation_internal",
    "use_kernels",
    "hf_model_name",
    "multimodal_cfg",
    "url",
    "file",
    "hf_hub_id",
    "hf_hub_filename",
    "source",
    "state_dict",
    "custom_load",
    "checkpoint_path",
    "bpe_path",
}
"""Keys that name code, a hub or a file outside the folder, or that load another model; null or false is no name."""


@dataclass(frozen=True)
class Check:
    """Which values of a key are taken."""

    what: str
    holds: Callable[[Any], bool]


def whole(low: int, high: int) -> Check:
    return Check(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Check:
    return Check(f"a number from {low:g} to {high:g}", lambda value: is_number(value) and low <= value <= high)


def one_of(*values: Any) -> Check:
    return Check(
        f"one of {', '.join(map(repr, values))}",
        lambda value: any(type(value) is type(known) and value == known for known in values),
    )


def list_of(length: int, item: Check) -> Check:
    return Check(
        f"a list of {length}, each {item.what}",
        lambda value: isinstance(value, list) and len(value) == length and all(map(item.holds, value)),
    )


def either(*checks: Check) -> Check:
    return Check(" or ".join(check.what for check in checks), lambda value: any(check.holds(value) for check in checks))


def or_null(check: Check) -> Check:
    return either(check, Check("null", lambda value: value is None))


def texts(pattern: str) -> Check:
    return Check(
        f"a text of the form {pattern}", lambda value: isinstance(value, str) and bool(re.fullmatch(pattern, value))
    )


FLAG = Check("true or false", lambda value: type(value) is bool)
SIDE = whole(1, MAX_PIXELS)
SIZE = either(SIDE, list_of(2, SIDE))
WIDTH, LAYERS, RATIO, SHARE = whole(1, MAX_WIDTH), whole(1, MAX_LAYERS), number(0.1, 64), number(0, 1)
PER_CHANNEL = list_of(3, number(-1000, 1000))
DEVIATION = list_of(3, number(1e-6, 1000))
ACTIVATION = one_of(
    "gelu",
    "quick_gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "gelu_fast",
    "relu",
    "silu",
    "swish",
    "tanh",
    "linear",
    "selu",
)
EPSILON = number(1e-12, 1e-2)
TIMM_NAME = texts(r"[a-z][a-z0-9_]{1,80}(\.[a-z0-9_]{1,80})?")
Known = dict[str, Check]


def known_values(
    file: Path, content: Any, known: Known, *, at: str = "", needed: tuple[str, ...] = (), strict: bool = True
) -> dict[str, Any]:
    """The values of the known keys. Raises UserError naming file and key.

    at: the keys above. strict: whether an unknown key is refused; where the library would ignore it, it is ignored.
    """
    place = f"{file}: {at}" if at else f"{file}: "
    if not isinstance(content, dict):
        raise UserError(f"{place.rstrip(': .')}: not a map of keys and values")
    refuse_elsewhere(file, content, at)
    for key in needed:
        if key not in content:
            raise UserError(f"{place}{key}: missing")
    for key, value in content.items():
        if key in known and not known[key].holds(value):
            raise UserError(f"{place}{key}: {_short(value)} is not {known[key].what}")
        if strict and key not in known:
            raise UserError(f"{place}{key}: a key that is not read here ({_short(value)})")
    return {key: value for key, value in content.items() if key in known}


def refuse_elsewhere(file: Path, content: Any, at: str = "") -> None:
    """Raises UserError for a key, at any depth, that names something outside the folder."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key in ELSEWHERE and value not in (None, False, "", {}, []):
                raise UserError(
                    f"{file}: {at}{key}: names code, weights or a model from elsewhere ({_short(value)}),"
                    " which is never loaded"
                )
            refuse_elsewhere(file, value, f"{at}{key}.")
    elif isinstance(content, list):
        for value in content:
            refuse_elsewhere(file, value, at)


def read_own(file: Path) -> dict[str, Any]:
    """A JSON file of the folder that it is in, and of no other. Raises UserError."""
    return read_json(inside(file.parent, file), dict)


def _short(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"


def _check_tokens(file: Path, size: Any, patch: int) -> None:
    height, width = size if isinstance(size, list) else (size, size)
    if (height // patch) * (width // patch) > MAX_TOKENS:
        raise UserError(f"{file}: an image of {height} x {width} in patches of {patch} has over {MAX_TOKENS} of them")


# ---- open_clip

OPEN_CLIP_BLOCK: Known = {
    "block_type": or_null(one_of("default", "custom")),
    "qk_norm": FLAG,
    "scaled_cosine_attn": FLAG,
    "scale_heads": FLAG,
    "scale_attn_inner": FLAG,
    "scale_attn": FLAG,
    "scale_fc": FLAG,
    "output_tokens": one_of(False),
    "ls_init_value": or_null(number(0, 1)),
    "final_ln_after_pool": FLAG,
    "mlp_ratio": RATIO,
    "width": WIDTH,
    "act_kwargs": or_null(one_of({}, {"approximate": "tanh"}, {"approximate": "none"})),
    "norm_kwargs": or_null(
        Check(
            "{'eps': a small number}",
            lambda value: (
                isinstance(value, dict) and all(key == "eps" and EPSILON.holds(eps) for key, eps in value.items())
            ),
        )
    ),
}
OPEN_CLIP_VISION: Known = OPEN_CLIP_BLOCK | {
    "layers": either(LAYERS, list_of(4, LAYERS)),
    "head_width": WIDTH,
    "patch_size": SIDE,
    "image_size": SIZE,
    "patch_dropout": SHARE,
    "attentional_pool": either(FLAG, one_of("parallel", "cascade")),
    "attn_pooler_queries": whole(1, MAX_TOKENS),
    "attn_pooler_heads": whole(1, 1024),
    "no_ln_pre": FLAG,
    "pos_embed_type": one_of("learnable", "sin_cos_2d"),
    "pool_type": one_of("tok", "avg", "none", ""),
    "timm_model_name": or_null(TIMM_NAME),
    "timm_model_pretrained": FLAG,
    "timm_pool": one_of("", "avg", "avgmax", "max", "token", "map", "abs_attn", "rot_attn"),
    "timm_proj": or_null(one_of("linear", "mlp", "none", "")),
    "timm_proj_bias": FLAG,
    "timm_drop": SHARE,
    "timm_drop_path": or_null(SHARE),
}
CLEANING = one_of("lower", "whitespace", "canonicalize")
OPEN_CLIP_TEXT: Known = OPEN_CLIP_BLOCK | {
    "layers": LAYERS,
    "context_length": whole(1, MAX_TOKENS),
    "vocab_size": whole(1, MAX_VOCABULARY),
    "heads": whole(1, 1024),
    "embed_cls": FLAG,
    "pad_id": whole(0, MAX_VOCABULARY),
    "eos_id": whole(0, MAX_VOCABULARY),
    "no_causal_mask": FLAG,
    "pool_type": one_of("argmax", "first", "last", "eos", "none", ""),
    "proj_bias": FLAG,
    "proj_type": or_null(one_of("linear", "none", "")),
    "tokenizer_mode": or_null(one_of("")),
    "hf_tokenizer_name": or_null(texts(".{0,200}")),
    "hf_model_name": or_null(one_of("")),
    "hf_model_pretrained": FLAG,
    "hf_proj_type": texts(".{0,40}"),
    "hf_pooler_type": texts(".{0,40}"),
    "tokenizer_kwargs": or_null(
        Check(
            "{'clean': one of lower, whitespace, canonicalize}",
            lambda value: (
                isinstance(value, dict)
                and all(key == "clean" and CLEANING.holds(clean) for key, clean in value.items())
            ),
        )
    ),
}
OPEN_CLIP_MODEL: Known = {
    "embed_dim": WIDTH,
    "vision_cfg": Check("a map", lambda value: isinstance(value, dict)),
    "text_cfg": Check("a map", lambda value: isinstance(value, dict)),
    "quick_gelu": FLAG,
    "custom_text": FLAG,
    "init_logit_scale": number(-100, 100),
    "init_logit_bias": or_null(number(-100, 100)),
    "nonscalar_logit_scale": FLAG,
}
OPEN_CLIP_PREPROCESS: Known = {
    "size": SIZE,
    "mode": one_of("RGB"),
    "mean": PER_CHANNEL,
    "std": DEVIATION,
    "interpolation": one_of("bicubic", "bilinear"),
    "resize_mode": one_of("shortest", "longest", "squash"),
    "fill_color": whole(0, 255),
}


@dataclass(frozen=True)
class OpenClipFacts:
    """open_clip_config.json: what its classes are built with."""

    model: dict[str, Any]
    is_custom_text: bool
    preprocess: dict[str, Any]
    tokenizer: dict[str, Any]
    """of its own tokenizer: clean"""
    has_tokenizer_file: bool
    """whether texts go through the folder's tokenizer.json"""


def read_open_clip(folder: Path) -> OpenClipFacts:
    """Raises UserError."""
    file = folder / "open_clip_config.json"
    content = read_own(file)
    known_values(file, content, {}, needed=("model_cfg",), strict=False)
    model = known_values(
        file, content["model_cfg"], OPEN_CLIP_MODEL, at="model_cfg.", needed=("embed_dim", "vision_cfg", "text_cfg")
    )
    vision = known_values(file, model["vision_cfg"], OPEN_CLIP_VISION, at="model_cfg.vision_cfg.")
    text = known_values(file, model["text_cfg"], OPEN_CLIP_TEXT, at="model_cfg.text_cfg.")
    preprocess = known_values(
        file, content.get("preprocess_cfg") or {}, OPEN_CLIP_PREPROCESS, at="preprocess_cfg.", strict=False
    )
    vision["timm_model_pretrained"] = False
    if not vision.get("timm_model_name"):
        _check_tokens(file, vision.get("image_size", 224), vision.get("patch_size", 16))
    tokenizer = text.pop("tokenizer_kwargs", None) or {}
    has_tokenizer_file = bool(text.pop("hf_tokenizer_name", None))
    is_custom_text = model.pop("custom_text", False)
    return OpenClipFacts(
        model | {"vision_cfg": vision, "text_cfg": text}, is_custom_text, preprocess, tokenizer, has_tokenizer_file
    )


# ---- transformers

HF_TOWER: Known = {
    "hidden_size": WIDTH,
    "intermediate_size": whole(1, 8 * MAX_WIDTH),
    "num_hidden_layers": LAYERS,
    "num_attention_heads": whole(1, 1024),
    "hidden_act": ACTIVATION,
    "layer_norm_eps": EPSILON,
    "initializer_range": number(0, 10),
    "initializer_factor": number(0, 10),
    "projection_dim": WIDTH,
    "attention_dropout": SHARE,
}
HF_IMAGES: Known = {"image_size": SIDE, "patch_size": SIDE, "num_channels": one_of(3)}
TOKEN_ID = or_null(whole(0, MAX_VOCABULARY))
HF_TOWERS: dict[str, Known] = {
    "clip_vision_model": HF_TOWER | HF_IMAGES,
    "vit": HF_TOWER
    | HF_IMAGES
    | {
        "hidden_dropout_prob": SHARE,
        "attention_probs_dropout_prob": SHARE,
        "qkv_bias": FLAG,
        "encoder_stride": SIDE,
        "pooler_output_size": or_null(WIDTH),
        "pooler_act": ACTIVATION,
    },
    "clip_text_model": HF_TOWER
    | {
        "vocab_size": whole(1, MAX_VOCABULARY),
        "max_position_embeddings": whole(1, MAX_TOKENS),
        "pad_token_id": TOKEN_ID,
        "bos_token_id": TOKEN_ID,
        "eos_token_id": whole(0, MAX_VOCABULARY),
    },
}
HF_MODEL: Known = {
    "model_type": one_of("clip", "vision-text-dual-encoder"),
    "projection_dim": WIDTH,
    "logit_scale_init_value": number(-100, 100),
    "is_decoder": one_of(False),
    "pruned_heads": one_of({}),
}
HF_PIXELS: Known = {
    "image_processor_type": one_of(
        "CLIPImageProcessor",
        "CLIPImageProcessorFast",
        "CLIPImageProcessorPil",
        "ViTImageProcessor",
        "ViTImageProcessorFast",
        "ViTImageProcessorPil",
    ),
    "feature_extractor_type": one_of("CLIPFeatureExtractor", "ViTFeatureExtractor"),
    "do_resize": FLAG,
    "do_center_crop": FLAG,
    "do_rescale": FLAG,
    "do_normalize": FLAG,
    "do_convert_rgb": FLAG,
    "default_to_square": FLAG,
    "resample": whole(0, 5),
    "rescale_factor": number(1e-6, 1),
    "image_mean": PER_CHANNEL,
    "image_std": DEVIATION,
    **dict.fromkeys(
        ("size", "crop_size"),
        either(
            SIDE,
            Check(
                f"sides from 1 to {MAX_PIXELS} by name (shortest_edge, or height and width)",
                lambda value: (
                    isinstance(value, dict)
                    and set(value) in ({"shortest_edge"}, {"height", "width"})
                    and all(map(SIDE.holds, value.values()))
                ),
            ),
        ),
    ),
}


@dataclass(frozen=True)
class HuggingFaceFacts:
    """config.json and preprocessor_config.json: what transformers' classes are built with."""

    is_clip: bool
    """a CLIPModel; else a VisionTextDualEncoderModel"""
    vision_type: str
    """clip_vision_model | vit"""
    model: dict[str, Any]
    vision: dict[str, Any]
    text: dict[str, Any]
    pixels: dict[str, Any]


def read_hugging_face(folder: Path) -> HuggingFaceFacts:
    """Raises UserError. Keys that CLIP's classes do not have are ignored, as they do."""
    file = folder / "config.json"
    content = read_own(file)
    model = known_values(file, content, HF_MODEL, needed=("model_type", "vision_config", "text_config"), strict=False)
    is_clip = model.pop("model_type") == "clip"
    towers: list[dict[str, Any]] = []
    types: list[str] = []
    for side, allowed in (
        ("vision", ("clip_vision_model",) if is_clip else ("vit", "clip_vision_model")),
        ("text", ("clip_text_model",)),
    ):
        known_values(file, content[f"{side}_config"], {}, at=f"{side}_config.", strict=False)
        kind = content[f"{side}_config"].get("model_type", allowed[0])
        if not isinstance(kind, str) or kind not in allowed:
            raise UserError(f"{file}: {side}_config.model_type: {_short(kind)} is not one of {', '.join(allowed)}")
        types.append(kind)
        towers.append(
            known_values(
                file,
                content[f"{side}_config"],
                HF_TOWERS[kind] | {"is_decoder": one_of(False)},
                at=f"{side}_config.",
                strict=False,
            )
        )
        towers[-1].pop("is_decoder", None)
    _check_tokens(file, towers[0].get("image_size", 224), towers[0].get("patch_size", 16 if types[0] == "vit" else 32))
    facts: dict[str, Any] = {key: model[key] for key in ("projection_dim", "logit_scale_init_value") if key in model}
    return HuggingFaceFacts(is_clip, types[0], facts, towers[0], towers[1], _read_pixels(folder))


def _read_pixels(folder: Path) -> dict[str, Any]:
    """transformers 5 writes the image processor's values into processor_config.json, or beside it."""
    file = folder / "processor_config.json"
    content = read_own(file) if file.is_file() else {}
    refuse_elsewhere(file, content)
    if "image_processor" in content:
        return known_values(file, content["image_processor"], HF_PIXELS, at="image_processor.", strict=False)
    file = folder / "preprocessor_config.json"
    return known_values(file, read_own(file), HF_PIXELS, strict=False)


# ---- timm

TIMM_ARGS: Known = {
    "img_size": SIZE,
    "patch_size": either(whole(1, 256), list_of(2, whole(1, 256))),
    "in_chans": one_of(3),
    "num_classes": whole(0, 1_000_000),
    "global_pool": one_of("", "avg", "avgmax", "max", "token", "map"),
    "embed_dim": WIDTH,
    "depth": LAYERS,
    "num_heads": whole(1, 1024),
    "mlp_ratio": RATIO,
    "qkv_bias": FLAG,
    "qk_norm": FLAG,
    "proj_bias": FLAG,
    "init_values": or_null(number(0, 1)),
    "class_token": FLAG,
    "pos_embed": one_of("", "none", "learn"),
    "no_embed_class": FLAG,
    "reg_tokens": whole(0, 256),
    "pre_norm": FLAG,
    "final_norm": FLAG,
    "pool_include_prefix": FLAG,
    "fc_norm": or_null(FLAG),
    "dynamic_img_size": FLAG,
    "dynamic_img_pad": FLAG,
    "drop_rate": SHARE,
    "pos_drop_rate": SHARE,
    "patch_drop_rate": one_of(0, 0.0),
    "proj_drop_rate": SHARE,
    "attn_drop_rate": SHARE,
    "drop_path_rate": SHARE,
    "act_layer": or_null(one_of("gelu", "quick_gelu", "gelu_tanh", "relu", "silu", "swish")),
    "norm_layer": or_null(one_of("layernorm", "layernorm2d", "rmsnorm", "batchnorm2d")),
}
CHANNELS_AND_SIDES = list_of(3, SIDE)
TIMM_PIXELS: Known = {
    "input_size": CHANNELS_AND_SIDES,
    "test_input_size": or_null(CHANNELS_AND_SIDES),
    "min_input_size": or_null(CHANNELS_AND_SIDES),
    "fixed_input_size": FLAG,
    "interpolation": one_of("bicubic", "bilinear"),
    "crop_pct": number(0.1, 2),
    "test_crop_pct": or_null(number(0.1, 2)),
    "crop_mode": one_of("center", "squash", "border"),
    "mean": PER_CHANNEL,
    "std": DEVIATION,
    "num_classes": whole(0, 1_000_000),
    "pool_size": or_null(list_of(2, SIDE)),
    "test_pool_size": or_null(list_of(2, SIDE)),
}


@dataclass(frozen=True)
class TimmFacts:
    """config.json: what timm.create_model is called with."""

    architecture: str
    model_args: dict[str, Any]
    pixels: dict[str, Any]


def read_timm(folder: Path) -> TimmFacts:
    """Raises UserError."""
    file = folder / "config.json"
    content = read_own(file)
    known = {"architecture": TIMM_NAME, "num_classes": whole(0, 1_000_000)}
    top = known_values(file, content, known, needed=("architecture", "pretrained_cfg"), strict=False)
    pixels = known_values(file, content["pretrained_cfg"], TIMM_PIXELS, at="pretrained_cfg.", strict=False)
    args = known_values(file, content.get("model_args") or {}, TIMM_ARGS, at="model_args.")
    if "num_classes" in top:
        pixels["num_classes"] = top["num_classes"]
    size, patch = args.get("img_size", pixels.get("input_size", [224, 224])[-2:]), args.get("patch_size", 16)
    _check_tokens(file, size, patch if isinstance(patch, int) else min(patch))
    return TimmFacts(top["architecture"], args, pixels)


# ---- ONNX

ONNX_FACTS = "clip_onnx.json"  # what is beside image.onnx and text.onnx, and the input of each
ONNX_INPUTS = {"image": "pixel_values", "text": "input_ids"}
ONNX: Known = {
    "image_size": SIDE,
    "context_length": whole(1, MAX_TOKENS),
    "eos_token_id": whole(0, MAX_VOCABULARY),
    "logit_scale": number(0, 1e6),
    "mean": one_of(list(MEAN)),
    "std": one_of(list(STD)),
}


def read_onnx(folder: Path) -> dict[str, Any]:
    """clip_onnx.json. Raises UserError. The preprocessing that it describes is ours, or it is refused."""
    file = folder / ONNX_FACTS
    needed = ("image_size", "context_length", "eos_token_id", "logit_scale")
    return known_values(file, read_own(file), ONNX, needed=needed, strict=False)
