"""DeepSpeed's files: each is sound and explained; what cannot be served is one line that names the fix."""

import json
from pathlib import Path

import pytest

from amclip_ds import config as settings
from amclip_ds.engine.ds_config import DS_CONFIGS
from amclip_ds.engine.student import EngineConfig, read_ds_config
from amclip_ds.errors import UserError
from amclip_ds.model.savings import Savings

FILES = sorted(DS_CONFIGS.glob("*.json"))


def zero(**settings: object) -> dict[str, object]:
    return {"zero_optimization": settings}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_is_read_and_its_name_is_true(file: Path) -> None:
    is_marked = "not_tested_here" in json.loads(file.read_text())
    ds = read_ds_config(EngineConfig(file.name, allow_untested=is_marked))
    stage, precision, *more = file.stem.split("_")
    assert stage == f"zero{ds['zero_optimization']['stage']}"
    assert (precision == "bf16") == bool(ds.get("bf16", {}).get("enabled"))
    assert ("offload" in more) == ("offload_optimizer" in ds["zero_optimization"])
    if stage != "zero0":
        assert ds["communication_data_type"] == "fp32"


def test_the_table_has_every_file() -> None:
    text = (DS_CONFIGS / "README.md").read_text()
    assert all(f"`{file.name}`" in text for file in FILES if "fp32" not in file.name or file.stem == "zero0_fp32")


def test_untested_files_are_refused_unless_allowed() -> None:
    for name in ("zero3_bf16_hpz.json", "zero3_bf16_zeropp.json"):
        with pytest.raises(UserError, match=r"not tested here \(zero_hpz.*engine\.allow_untested=true"):
            read_ds_config(EngineConfig(name))
        assert "not_tested_here" not in read_ds_config(EngineConfig(name, allow_untested=True))


@pytest.mark.parametrize(
    ("ds", "words"),
    [
        ({"train_batch_size": 8}, "sets 'train_batch_size', which batch.global_size decides"),
        ({"train_micro_batch_size_per_gpu": 8}, "which batch.per_gpu decides"),
        ({"optimizer": {}}, r"which optim\.\* decides"),
        ({"gradient_clipping": 1.0}, "which optim.clip_grad_norm decides"),
        ({"bf16": {"enabled": True}}, "bf16 at stage 0.*use stage 1"),
        ({"fp16": {"enabled": True}}, "fp16.*use bf16"),
        (zero(stage=4), "stage 4; there are 0, 1, 2 and 3"),
        (zero(stage=0, offload_optimizer={"device": "cpu"}), "offload_optimizer at ZeRO stage 0"),
        (zero(stage=2, offload_param={"device": "cpu"}), "offload_param.*stage 2.*needs stage 3"),
        (zero(stage=3, zero_quantized_weights=True), "not tested here.*zero_quantized_weights"),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "sets 'data_types'"),
        ([1], "not a DeepSpeed config"),
    ],
    ids=str,
)
def test_refuses(tmp_path: Path, ds: object, words: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(ds))
    with pytest.raises(UserError, match=words) as caught:
        read_ds_config(EngineConfig(str(file)))
    assert str(caught.value).startswith("engine.deepspeed: ") and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_file_lists_what_there_is() -> None:
    with pytest.raises(UserError, match="no file 'zero9.json'; ds_configs/ has zero0_fp32.json, zero1_bf16.json"):
        read_ds_config(EngineConfig("zero9.json"))


@pytest.mark.parametrize(
    ("word", "mode"), [("true", "auto"), ("false", "none"), ("auto", "auto"), ("block", "block"), ("tower", "tower")]
)
def test_compile_takes_words_and_what_earlier_runs_wrote(word: str, mode: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved.yaml"
    saved.write_text(f"recipe: aclip-tiny\nengine: {{compile: {word}}}\n")
    typed = settings.load("aclip-tiny", [f"engine.compile={word}"])
    for config in (typed, settings.load(str(saved))):
        assert config.engine.compile == mode
    again = tmp_path / "again.yaml"
    again.write_text(settings.dump(typed))
    assert settings.load(str(again)) == typed


@pytest.mark.parametrize("word", ["towers", "1", "3.5", "null"])
def test_compile_refuses(word: str) -> None:
    with pytest.raises(UserError, match=r"engine\.compile: .*auto, none, block, tower"):
        settings.load("aclip-tiny", [f"engine.compile={word}"])


def test_savings_are_switches() -> None:
    config = settings.load("aclip-tiny", ["engine.savings.last_block=false"])
    assert config.engine.savings == Savings(last_block=False)
    with pytest.raises(UserError, match=r"did you mean engine\.savings\.patchify"):
        settings.load("aclip-tiny", ["engine.savings.patchfy=false"])
