"""A stranger's export: nothing in it runs, names another place, or costs more than its files; each refusal is one line.

Every trap writes a file when it springs. The twins load what the libraries themselves write for ordinary CLIP models.
"""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from amclip_ds.errors import UserError
from amclip_ds.evaluate.source import locate, open_encoder
from amclip_ds.model import pretrained
from tests.unit.evaluate.exports import FORMATS, write_export

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our four formats of a tiny model, unproved."""
    folder = tmp_path_factory.mktemp("exports")
    for fmt in FORMATS:
        write_export(fmt, folder / fmt)
    return folder


@pytest.fixture
def export(exports: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda fmt: shutil.copytree(exports / fmt, tmp_path / fmt)


@pytest.fixture
def sprung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a trap writes; and the Python that would write it, importable from the folder and from here."""
    file = tmp_path / "sprung"
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # `yes |` to a question that must not be asked
    return file


def trap(folder: Path, sprung: Path) -> None:
    code = f"open({str(sprung)!r}, 'w').close()\n"
    code += "from transformers import PreTrainedTokenizerFast as T, CLIPModel as M, CLIPConfig as C\n"
    code += "class Tokenizer(T): pass\nclass Model(M): pass\nclass Config(C): pass\n"
    for name in ("trap.py", "tokenization_trap.py", "modeling_trap.py"):
        (folder / name).write_text(code)


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def put(file: str, path: str, value: Any) -> Callable[[Path], None]:
    """Sets a key, `a.b.c`, of one of the folder's JSON files."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        inner = content
        *above, last = path.split(".")
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = value
        (folder / file).write_text(json.dumps(content))

    return change


def refused(folder: Path) -> str:
    """What `amclip eval` says of a folder."""
    with pytest.raises(UserError) as caught:
        open_encoder(locate(folder), "student", CPU)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


OPEN_CLIP = "open_clip_config.json"
CODE = {"AutoTokenizer": ["trap.Tokenizer", "trap.Tokenizer"], "AutoModel": "trap.Model", "AutoConfig": "trap.Config"}
ELSEWHERE = [
    ("open_clip", OPEN_CLIP, "model_cfg.text_cfg.tokenizer_kwargs", {"trust_remote_code": True}, "trust_remote_code"),
    ("open_clip", OPEN_CLIP, "model_cfg.text_cfg.tokenizer_kwargs", {"bpe_path": "/etc/passwd"}, "bpe_path"),
    (
        "open_clip",
        OPEN_CLIP,
        "model_cfg.text_cfg.tokenizer_kwargs",
        {"additional_special_tokens": ["(a+)+$"]},
        "kwargs",
    ),
    ("open_clip", OPEN_CLIP, "model_cfg.text_cfg.tokenizer_kwargs", {"reduction_mask": "syntax"}, "tokenizer_kwargs"),
    ("open_clip", OPEN_CLIP, "model_cfg.text_cfg.hf_model_name", "stranger/model", "hf_model_name"),
    ("open_clip", OPEN_CLIP, "model_cfg.text_cfg.hf_model_name", "/etc", "hf_model_name"),
    ("open_clip", OPEN_CLIP, "model_cfg.vision_cfg.timm_model_name", "hf-hub:stranger/model", "timm_model_name"),
    ("open_clip", OPEN_CLIP, "model_cfg.vision_cfg.timm_model_name", "local-dir:/tmp/x", "timm_model_name"),
    ("open_clip", OPEN_CLIP, "model_cfg.multimodal_cfg", {"hf_model_name": "x"}, "multimodal_cfg"),
    ("open_clip", OPEN_CLIP, "model_cfg.vision_cfg.act_kwargs", {"approximate": "os.system"}, "act_kwargs"),
    ("open_clip", OPEN_CLIP, "model_cfg.custom_loader", "x", "custom_loader"),
    ("open_clip", OPEN_CLIP, "model_cfg.embed_dim", True, "embed_dim"),
    ("open_clip", OPEN_CLIP, "model_cfg.embed_dim", 1e400, "embed_dim"),
    ("open_clip", OPEN_CLIP, "preprocess_cfg.std", [0, 1, 1], "preprocess_cfg.std"),
    ("hf", "config.json", "auto_map", CODE, "auto_map"),
    ("hf", "config.json", "text_config.auto_map", CODE, "auto_map"),
    ("hf", "config.json", "quantization_config", {"quant_method": "trap"}, "quantization_config"),
    ("hf", "config.json", "_attn_implementation", "stranger/kernel", "_attn_implementation"),
    ("hf", "config.json", "vision_config.attn_implementation", "stranger/kernel", "attn_implementation"),
    ("hf", "config.json", "model_type", "llava", "model_type"),
    ("hf", "config.json", "text_config.model_type", "trap", "text_config.model_type"),
    ("hf", "config.json", "text_config.hidden_act", "trap.Activation", "hidden_act"),
    ("hf", "tokenizer_config.json", "auto_map", CODE, "auto_map"),
    ("hf", "tokenizer_config.json", "padding_side", "left", "padding_side"),
    ("hf", "preprocessor_config.json", "auto_map", {"AutoImageProcessor": "trap.Processor"}, "auto_map"),
    ("hf", "preprocessor_config.json", "image_processor_type", "TrapProcessor", "image_processor_type"),
    ("hf", "processor_config.json", "auto_map", {"AutoProcessor": "trap.Processor"}, "auto_map"),
    ("timm", "config.json", "architecture", "hf-hub:stranger/model", "architecture"),
    ("timm", "config.json", "architecture", "../../x", "architecture"),
    ("timm", "config.json", "architecture", "vit_of_nobody", "architecture"),
    ("timm", "config.json", "pretrained_cfg.file", "/etc/passwd", "pretrained_cfg.file"),
    ("timm", "config.json", "pretrained_cfg.url", "https://stranger.example/w.pth", "pretrained_cfg.url"),
    ("timm", "config.json", "pretrained_cfg.hf_hub_id", "stranger/model", "hf_hub_id"),
    ("timm", "config.json", "pretrained_cfg.custom_load", True, "custom_load"),
    ("timm", "config.json", "model_args.norm_layer", "trap.Norm", "norm_layer"),
    ("timm", "config.json", "model_args.checkpoint_path", "/etc/passwd", "checkpoint_path"),
    ("timm", "config.json", "model_args.weight_init", "jax", "weight_init"),
    ("onnx", "clip_onnx.json", "image_size", 10**9, "image_size"),
    ("onnx", "clip_onnx.json", "mean", [0, 0, 0], "mean"),
    ("onnx", "clip_onnx.json", "logit_scale", "high", "logit_scale"),
]


@pytest.mark.parametrize(
    ("fmt", "file", "key", "value", "named"),
    ELSEWHERE,
    ids=[f"{row[0]} {row[2]} {str(row[3])[:20]}" for row in ELSEWHERE],
)
def test_a_key_that_is_not_ours_to_follow(fmt, file, key, value, named, export, sprung) -> None:
    folder = export(fmt)
    trap(folder, sprung)
    put(file, key, value)(folder)
    said = refused(folder)
    assert named in said and file in said, said
    assert not sprung.exists()


def test_the_issue_s_own_trap(export, sprung: Path) -> None:
    """An hf tokenizer named by the config, its Python beside it; also with the config's word for it left out."""
    for kwargs in ({"trust_remote_code": True}, {}):
        folder = export("open_clip")
        trap(folder, sprung)
        put(OPEN_CLIP, "model_cfg.text_cfg.hf_tokenizer_name", "trap")(folder)
        put(OPEN_CLIP, "model_cfg.text_cfg.tokenizer_kwargs", kwargs)(folder)
        put("tokenizer_config.json", "auto_map", CODE)(folder)
        put("tokenizer_config.json", "tokenizer_class", "Tokenizer")(folder)
        refused(folder)
        assert not sprung.exists()
        shutil.rmtree(folder)


WEIGHTS = {"open_clip": "open_clip_model.safetensors", "hf": "model.safetensors", "timm": "model.safetensors"}


@pytest.mark.parametrize("fmt", WEIGHTS)
@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "open_clip_pytorch_model.bin", "model.pth", "x.pt"])
def test_a_pickle_is_refused_by_name(fmt: str, pickle: str, export) -> None:
    folder = export(fmt)
    torch.save(load_file(folder / WEIGHTS[fmt]), folder / pickle)
    (folder / WEIGHTS[fmt]).unlink()
    for said in (refused(folder), init_from_refused(folder)):
        assert pickle in said and "safetensors.torch.save_file" in said


def init_from_refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        pretrained.Source(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("fmt", WEIGHTS)
def test_a_link_out_of_the_folder_is_refused(fmt: str, export, tmp_path: Path) -> None:
    folder = export(fmt)
    shutil.move(folder / WEIGHTS[fmt], tmp_path / "elsewhere.safetensors")
    (folder / WEIGHTS[fmt]).symlink_to(tmp_path / "elsewhere.safetensors")
    for said in (refused(folder), init_from_refused(folder)):
        assert WEIGHTS[fmt] in said and "leads out of its folder" in said


def test_a_download_cache_is_links_and_loads(export, tmp_path: Path) -> None:
    """The twin: models--X/snapshots/HASH, whose files are links to ../../blobs."""
    cache = tmp_path / "models--someone--clip"
    (cache / "blobs").mkdir(parents=True)
    folder = cache / "snapshots" / "abc"
    folder.mkdir(parents=True)
    for number, file in enumerate(export("hf").iterdir()):
        shutil.move(file, cache / "blobs" / str(number))
        (folder / file.name).symlink_to(Path("../../blobs") / str(number))
    open_encoder(locate(folder), "student", CPU)


def test_an_index_names_no_other_place(export, tmp_path: Path) -> None:
    folder = export("hf")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(tensors, "../model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "holds no weights" in refused(folder)


HUGE = [
    ("open_clip", OPEN_CLIP, "model_cfg.text_cfg.vocab_size", 1_900_000),
    ("open_clip", OPEN_CLIP, "model_cfg.vision_cfg.layers", 200),
    ("open_clip", OPEN_CLIP, "model_cfg.vision_cfg.image_size", 1024),
    ("hf", "config.json", "text_config.intermediate_size", 100_000),
    ("hf", "config.json", "text_config.vocab_size", 1_999_999),
    ("timm", "config.json", "model_args.embed_dim", 16_384),
    ("timm", "config.json", "architecture", "vit_giant_patch14_224"),
]


@pytest.mark.parametrize(("fmt", "file", "key", "value"), HUGE)
def test_a_config_asks_for_no_more_than_its_weights(fmt: str, file: str, key: str, value: Any, export) -> None:
    import resource

    folder = export(fmt)
    put(file, key, value)(folder)
    if key == "architecture":
        put(file, "model_args", {})(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB


TOKENIZERS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    (
        "a pattern that never ends",
        lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(a+)+(b+)+$"),
        "pattern",
    ),
    (
        "a normalizer that grows",
        lambda c: c.update(normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "x" * 10**6}),
        "content",
    ),
    (
        "a part that is unknown",
        lambda c: c.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "normalizer.type",
    ),
    ("ids that change", lambda c: c["model"].update(dropout=0.5), "dropout"),
    ("an id too large", lambda c: c["model"]["vocab"].update(x=2**40), "id"),
    ("an id that is a text", lambda c: c.update(added_tokens=[{"id": "7", "content": "x"}]), "id"),
    ("another model", lambda c: c["model"].update(type="Trap"), "model.type"),
    ("merges that are none", lambda c: c["model"].update(merges=[[1, 2]]), "tokenizer.json"),
    ("no model", lambda c: c.pop("model"), "model"),
]


@pytest.mark.parametrize("fmt", ["hf", "onnx"])
@pytest.mark.parametrize(("change", "named"), [row[1:] for row in TOKENIZERS], ids=[row[0] for row in TOKENIZERS])
def test_a_tokenizer_of_known_parts(fmt: str, change: Callable, named: str, export) -> None:
    folder = export(fmt)
    edit(folder / "tokenizer.json", change)
    said = refused(folder)
    assert named in said and "tokenizer.json" in said


def test_a_token_beyond_the_vocabulary_is_named(export) -> None:
    folder = export("hf")
    edit(folder / "tokenizer.json", lambda c: c["post_processor"].update(cls=["<|startoftext|>", 700_000]))
    assert "gives the token 700000" in refused(folder)


def test_weights_that_give_no_number_are_refused(export) -> None:
    folder = export("timm")
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = torch.full_like(tensors["norm.weight"], float("nan"))
    save_file(tensors, folder / "model.safetensors")
    assert "not finite" in refused(folder)


def graph_of(folder: Path) -> tuple[Any, Any]:
    onnx = pytest.importorskip("onnx")
    return onnx, onnx.load(folder / "image.onnx", load_external_data=False)


def lead_to(location: str) -> Callable[[Any, Any], None]:
    def change(onnx: Any, model: Any) -> None:
        for entry in model.graph.initializer[0].external_data:
            if entry.key == "location":
                entry.value = location

    return change


def add_node(onnx: Any, model: Any, node: Any) -> None:
    model.graph.node.insert(0, node)


def loop(onnx: Any, model: Any) -> None:
    body = onnx.helper.make_graph([], "body", [], [])
    add_node(onnx, model, onnx.helper.make_node("Loop", ["", ""], ["never"], body=body))


def claim_shape(onnx: Any, model: Any) -> None:
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend([3_000_000, 1_000])


GRAPHS: list[tuple[str, Callable[[Any, Any], Any], str]] = [
    ("weights above the folder", lead_to("../elsewhere.data"), "not beside it"),
    ("weights by a whole path", lead_to("/etc/passwd"), "not beside it"),
    ("weights of no file", lead_to("nothing.data"), "missing"),
    ("weights of the folder itself", lead_to("."), "not beside it"),
    (
        "an operator of a library",
        lambda onnx, model: add_node(onnx, model, onnx.helper.make_node("Trap", [], ["t"], domain="ai.onnx.contrib")),
        "operator",
    ),
    ("a loop", loop, "operator"),
    ("a shape that is not its bytes", claim_shape, "are not whole"),
    (
        "a function",
        lambda onnx, model: model.functions.append(
            onnx.helper.make_function("own", "F", [], [], [], [onnx.helper.make_opsetid("", 20)])
        ),
        "functions",
    ),
]


@pytest.mark.parametrize(("change", "named"), [row[1:] for row in GRAPHS], ids=[row[0] for row in GRAPHS])
def test_a_graph_of_arithmetic_on_its_own_weights(change: Callable, named: str, export, tmp_path: Path) -> None:
    folder = export("onnx")
    shutil.copy(folder / "image.onnx.data", tmp_path / "elsewhere.data")
    onnx, model = graph_of(folder)
    change(onnx, model)
    onnx.save(model, folder / "image.onnx")
    said = refused(folder)
    assert named in said and ("image.onnx" in said or "nothing.data" in said), said


def test_a_graph_s_memory_is_bounded(export) -> None:
    """A few bytes that ask for 40 GB."""
    folder = export("onnx")
    onnx, model = graph_of(folder)
    shape = onnx.helper.make_tensor("how_many", onnx.TensorProto.INT64, [1], [10_000_000_000])
    wanted = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["before" if name == wanted else name for name in node.output]
    model.graph.initializer.append(shape)
    model.graph.node.append(onnx.helper.make_node("ConstantOfShape", ["how_many"], ["all"]))
    model.graph.node.append(onnx.helper.make_node("ReduceSum", ["all"], ["zero"], keepdims=0))
    model.graph.node.append(onnx.helper.make_node("Add", ["before", "zero"], [wanted]))
    onnx.save(model, folder / "image.onnx")
    assert "Available memory of" in refused(folder)


# ---- the twins: what the libraries themselves write


def test_ordinary_models_of_the_libraries_load(exports: Path, tmp_path: Path) -> None:
    import open_clip
    import timm
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    small: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(text_config=small, vision_config=small | {"image_size": 64, "patch_size": 16})
    pixels = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64)
    words = CLIPTokenizerFast.from_pretrained(exports / "hf")
    CLIPModel(config).save_pretrained(tmp_path / "whole")
    CLIPProcessor(pixels, words).save_pretrained(tmp_path / "whole")
    CLIPModel(config).save_pretrained(tmp_path / "parts", max_shard_size="5MB")
    pixels.save_pretrained(tmp_path / "parts")
    words.save_pretrained(tmp_path / "parts")
    cfg = {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    }
    native = open_clip.CLIP(**json.loads(json.dumps(cfg)))
    words.save_pretrained(tmp_path / "with a tokenizer")
    for name, more in (("native", {}), ("with a tokenizer", {"hf_tokenizer_name": "someone/clip"})):
        (tmp_path / name).mkdir(exist_ok=True)
        text = cfg["text_cfg"] | more
        (tmp_path / name / OPEN_CLIP).write_text(json.dumps({"model_cfg": cfg | {"text_cfg": text}}))
        save_file(native.state_dict(), tmp_path / name / "open_clip_model.safetensors")
    timm.models.save_for_hf(timm.create_model("resnet18", num_classes=0), tmp_path / "resnet", safe_serialization=True)
    for folder in ("whole", "parts", "native", "with a tokenizer", "resnet"):
        for pixels_of in ("ours", "library"):
            open_encoder(locate(tmp_path / folder), "student", CPU, pixels_of)
    own, file = (open_encoder(locate(tmp_path / name), "student", CPU) for name in ("native", "with a tokenizer"))
    texts = ["a photo of a red boat!", "it's 7 o'clock"]
    assert torch.equal(own.text(texts), file.text(texts))


@pytest.mark.parametrize("fmt", FORMATS)
def test_ours_load_without_a_network(fmt: str, exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    open_encoder(locate(exports / fmt), "student", CPU, "library")
