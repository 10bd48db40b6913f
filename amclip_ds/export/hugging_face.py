"""A folder for transformers' `from_pretrained` and pipelines, image processor and tokenizer included.

A tower with a norm before its blocks is CLIP's own and becomes a CLIPModel (its patch bias, which CLIP's lacks, is
folded into the positions). The paper's tower becomes a VisionTextDualEncoderModel: a ViTModel whose pooler, a dense
layer behind the CLS feature, is made the identity.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from amclip_ds.data.photometric import MEAN, STD
from amclip_ds.errors import UserError
from amclip_ds.evaluate.foreign_tokenizer import PUNCTUATION
from amclip_ds.export.open_clip import activation_of, blocks_of, fold_patch_bias, refuse_mean
from amclip_ds.model import other_libraries
from amclip_ds.model.amclip import AClip
from amclip_ds.model.config import ModelConfig
from amclip_ds.module_alone import import_alone

START, END = "<|startoftext|>", "<|endoftext|>"


def write(folder: Path, module: AClip, model: ModelConfig) -> None:
    """Writes config.json, model.safetensors, the image processor's and the tokenizer's files. Raises UserError."""
    is_clip = not isinstance(module.vision.norm_pre, nn.Identity)
    _check(module, model)
    state = {name: tensor for name, tensor in module.state_dict().items() if name != "logit_bias"}
    if is_clip:
        config, tensors = (
            _clip_config(module, model),
            other_libraries.export_state("transformers CLIPModel", fold_patch_bias(state)),
        )
    else:
        config, tensors = _dual_config(module, model), _dual_tensors(state)
    config.architectures = ["CLIPModel" if is_clip else "VisionTextDualEncoderModel"]
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_image_processor(folder, model.vision.image_size)
    _write_tokenizer(folder, model)
    processor = "CLIPProcessor" if is_clip else "VisionTextDualEncoderProcessor"
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": processor}) + "\n")


def _check(module: AClip, model: ModelConfig) -> None:
    refuse_mean("hf", model)
    block = blocks_of(module)[0]
    if not isinstance(block.ls1, nn.Identity):
        raise UserError("--format hf: transformers' ViT has no layer scale; --format timm keeps it")
    if not module.vision.cls_has_position:
        raise UserError("--format hf: transformers' ViT has a position for the class token; --format timm needs none")


def _text_config(model: ModelConfig) -> Any:
    from transformers import CLIPTextConfig

    text = model.text
    return CLIPTextConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        intermediate_size=int(text.width * text.mlp_ratio),
        num_hidden_layers=text.depth,
        num_attention_heads=text.heads,
        max_position_embeddings=text.context_length,
        hidden_act=text.activation,
        layer_norm_eps=1e-5,
        projection_dim=model.embed_dim,
        eos_token_id=text.eos_token_id,
        bos_token_id=text.eos_token_id - 1,
        pad_token_id=text.eos_token_id,
    )


def _vision_facts(module: AClip, model: ModelConfig) -> dict[str, Any]:
    vision, block = cast(Any, module.vision), blocks_of(module)[0]
    return {
        "hidden_size": vision.width,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(vision.blocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": activation_of(module),
        "layer_norm_eps": vision.norm.eps,
        "image_size": model.vision.image_size,
        "patch_size": vision.patch_size,
    }


def _clip_config(module: AClip, model: ModelConfig) -> Any:
    from transformers import CLIPConfig, CLIPVisionConfig

    vision = CLIPVisionConfig(**_vision_facts(module, model), projection_dim=model.embed_dim)
    return CLIPConfig(
        text_config=_text_config(model).to_dict(), vision_config=vision.to_dict(), projection_dim=model.embed_dim
    )


def _dual_config(module: AClip, model: ModelConfig) -> Any:
    from transformers import VisionTextDualEncoderConfig, ViTConfig

    facts = _vision_facts(module, model)
    vision = ViTConfig(**facts, qkv_bias=True, pooler_act="linear", pooler_output_size=facts["hidden_size"])
    return VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, _text_config(model), projection_dim=model.embed_dim
    )


def _dual_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = other_libraries.export_state("transformers VisionTextDualEncoderModel", state)
    width = state["vision.cls_token"].shape[-1]
    tensors["vision_model.pooler.dense.weight"] = torch.eye(width)
    tensors["vision_model.pooler.dense.bias"] = torch.zeros(width)
    return tensors


def _write_image_processor(folder: Path, size: int) -> None:
    facts = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 2,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(facts, indent=1) + "\n")


def _write_tokenizer(folder: Path, model: ModelConfig) -> None:
    """CLIP's byte-pair encoding in tokenizers' form, with normalizers for what ftfy would do to punctuation."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(),
        model_max_length=model.text.context_length,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=1) + "\n")


def build_tokenizer() -> Any:
    """The tokenizers.Tokenizer."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    from amclip_ds.data.captions import WORDS

    clip = import_alone("open_clip", "tokenizer").SimpleTokenizer()
    merges = [pair for pair, _ in sorted(clip.bpe_ranks.items(), key=lambda item: item[1])]
    special = {clip.sot_token_id: START, clip.eot_token_id: END}  # open_clip calls them otherwise
    vocab = {special.get(number, word): number for word, number in clip.encoder.items()}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=END,
        )
    )
    replaced = [normalizers.Replace(Regex(pattern), plain) for pattern, plain in PUNCTUATION.items()]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), *replaced, normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    ends = (END, clip.eot_token_id), (START, clip.sot_token_id)
    tokenizer.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = build_decoder()
    return tokenizer


def build_decoder(dropped: tuple[str, ...] = ()) -> Any:
    """Ids back to words with a space between; a letter may be spread over several tokens, so their bytes come first.

    dropped: tokens without a text, for a tokenizer that does not know them to be special.
    """
    from tokenizers import Regex, decoders

    ends = [decoders.Replace(token, "") for token in dropped]
    words = decoders.Replace(Regex("</w>$"), ""), decoders.Replace("</w>", " ")
    return decoders.Sequence([decoders.ByteLevel(), *ends, *words])
