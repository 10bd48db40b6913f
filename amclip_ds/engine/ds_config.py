"""DeepSpeed's own settings: the key that names their file, and the reading and checking of it, without DeepSpeed."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amclip_ds.errors import NotRead, UserError
from amclip_ds.files import read_json
from amclip_ds.model.savings import Savings

DS_CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"  # in a checkout a link to the folder at the top
DECIDED_BY_THE_RUN = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.per_gpu",
    "gradient_accumulation_steps": "batch.per_gpu",
    "optimizer": "optim.*",
    "scheduler": "optim.*",
    "gradient_clipping": "optim.clip_grad_norm",
}
UNTESTED = (
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
)
AUTO, NO_COMPILE, BLOCK, TOWER = "auto", "none", "block", "tower"
NO_FP8, FP8_TEACHER, FP8_ALL = "none", "teacher", "all"


@dataclass
class EngineConfig:
    """What DeepSpeed does for the run."""

    deepspeed: str = "zero1_bf16.json"
    """A file in ds_configs/ or a path: ZeRO stage, precision, offload, buckets (ds_configs/README.md helps choose)."""
    allow_untested: bool = False
    """True: accept ds_configs files marked 'not tested here' (ZeRO++)."""
    compile: str | bool = AUTO
    """auto: on a GPU tower, else none | none | block | tower: what torch.compile takes as one piece; with tower, heads
    and losses are compiled too. At ZeRO 3 on several ranks tower means block."""
    flat_gradients: bool = True
    """At ZeRO 1, gradients as one flat fp32 tensor a parameter group (not for Muon, nor with overlap_comm)."""
    fp8: str = NO_FP8
    """none | teacher (its image tower) | all (the student's towers too): fp8 in the blocks' Linear layers, by torchao
    (`pip install 'amclip_ds[fp8]'`), on Hopper, Ada or newer; bf16 files of stages 1 and 2. It changes numbers."""
    savings: Savings = field(default_factory=Savings)
    """Work that is left out since nothing reads it."""

    def __post_init__(self) -> None:
        words = {"true": AUTO, "false": NO_COMPILE}  # what the key was in earlier runs
        self.compile = words.get(str(self.compile).lower(), self.compile)
        if self.compile not in (AUTO, NO_COMPILE, BLOCK, TOWER):
            raise ValueError(f"engine.compile: {self.compile!r} is none of auto, none, block, tower (true, false)")
        if self.fp8 not in (NO_FP8, FP8_TEACHER, FP8_ALL):
            raise ValueError(f"engine.fp8: {self.fp8!r} is none of none, teacher, all")


def read_ds_config(config: EngineConfig) -> dict[str, Any]:
    """DeepSpeed's own settings. Raises UserError for a missing or invalid file, naming the key to use instead."""
    path = next((path for path in (Path(config.deepspeed), DS_CONFIGS / config.deepspeed) if path.is_file()), None)
    if path is None:
        known = ", ".join(sorted(file.name for file in DS_CONFIGS.glob("*.json")))
        raise UserError(f"engine.deepspeed: no file {config.deepspeed!r}; ds_configs/ has {known}")
    try:
        ds = read_json(path, dict, 1 << 20)
    except NotRead as error:
        raise NotRead(f"engine.deepspeed: {error}") from None
    except UserError as error:
        raise UserError(f"engine.deepspeed: {error}: not a DeepSpeed config in JSON") from None
    if not isinstance(ds.get("zero_optimization", {}), dict):
        raise UserError(f"engine.deepspeed: {path}: zero_optimization is no object")
    for complaint in validation_errors(ds, config):
        raise UserError(f"engine.deepspeed: {path.name} {complaint}")
    ds.pop("not_tested_here", None)
    return ds


def validation_errors(ds: dict[str, Any], config: EngineConfig) -> Iterator[str]:
    """What speaks against a DeepSpeed config, each as the rest of a sentence that begins with the file's name."""
    zero = ds.get("zero_optimization", {})
    for key, ours in DECIDED_BY_THE_RUN.items():
        if key in ds:
            yield f"sets {key!r}, which {ours} decides; remove it from the file"
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        yield f"asks for ZeRO stage {zero['stage']!r}; there are 0, 1, 2 and 3"
    if ds.get("fp16", {}).get("enabled"):
        yield "asks for fp16, whose loss scaling the losses do not know; use bf16"
    if stage_of(ds) == 0 and ds.get("bf16", {}).get("enabled"):
        yield "asks for bf16 at stage 0, which DeepSpeed does not do; use stage 1 (zero1_bf16.json)"
    if "data_types" in ds:
        yield "sets 'data_types', with which DeepSpeed takes another optimizer at stage 1; remove it from the file"
    for part, least in (("offload_optimizer", 1), ("offload_param", 3)):
        if is_offloaded(ds, part) and stage_of(ds) < least:
            yield f"sets {part} at ZeRO stage {stage_of(ds)}, and that needs stage {least} or more"
    untested = [key for key in UNTESTED if zero.get(key) is True or int(zero.get(key) or 0) > 1]
    if (untested or ds.get("not_tested_here")) and not config.allow_untested:
        named = f" ({', '.join(untested)})" if untested else ""
        yield f"is not tested here{named}; engine.allow_untested=true uses it all the same"


def check_optimizer(ds: dict[str, Any], file: str, name: str) -> None:
    """Raises UserError for an optimizer that cannot step under a DeepSpeed config."""
    if is_offloaded(ds, "offload_optimizer") and name != "adamw":
        raise UserError(
            f"optim.name: {name} cannot step in host memory, where {file} keeps the optimizer; use adamw, or a"
            f" file without _offload"
        )
    zero = ds.get("zero_optimization", {})
    found = [key for key in UNTESTED if zero.get(key) is True or int(zero.get(key) or 0) > 1]
    if name == "muon" and found:
        raise UserError(f"optim.name: muon reads whole gradients, and {file} sets {', '.join(found)}; use adamw")


def is_flat(ds: dict[str, Any], config: EngineConfig, optimizer: str) -> bool:
    """Whether gradients are flat (engine/flat_gradients.py): at ZeRO 1 on the device, unless their sending is to
    overlap the backward. Muon reads whole matrices on the way. optimizer: optim.name."""
    asked = config.flat_gradients and not ds.get("zero_optimization", {}).get("overlap_comm")
    return asked and stage_of(ds) == 1 and not is_offloaded(ds, "offload_optimizer") and optimizer != "muon"


def check_fp8(ds: dict[str, Any], engine: EngineConfig) -> None:
    """Raises UserError where engine.fp8 asks for what a DeepSpeed config cannot do."""
    if engine.fp8 == NO_FP8:
        return
    if stage_of(ds) == 3:
        raise UserError(
            f"engine.fp8: {engine.fp8} needs a layer's whole weight, and {engine.deepspeed} shards it (ZeRO stage 3);"
            f" use a bf16 file of stage 1 or 2, or engine.fp8=none"
        )
    if not ds.get("bf16", {}).get("enabled"):
        raise UserError(
            f"engine.fp8: {engine.fp8} is for bf16 runs, and {engine.deepspeed} is fp32; use"
            f" engine.deepspeed=zero1_bf16.json (or 2), or engine.fp8=none"
        )


def check_torchao(engine: EngineConfig) -> None:
    """Raises UserError where engine.fp8 asks for a package that is not installed."""
    if engine.fp8 != NO_FP8 and importlib.util.find_spec("torchao") is None:
        raise UserError(
            f"engine.fp8: {engine.fp8} needs torchao, which is not installed: pip install 'amclip_ds[fp8]', or"
            f" engine.fp8=none"
        )


def stage_of(ds: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed config."""
    return int(ds.get("zero_optimization", {}).get("stage", 0))


def is_offloaded(ds: dict[str, Any], part: str) -> bool:
    """Whether a DeepSpeed config moves `part` (offload_optimizer, offload_param) out of the device's memory."""
    return ds.get("zero_optimization", {}).get(part, {}).get("device", "none") != "none"


def fetches_weights(ds: dict[str, Any], world_size: int) -> bool:
    """Whether weights come and go: at stage 3, unless one rank has all of them where they are read."""
    return stage_of(ds) == 3 and (world_size > 1 or is_offloaded(ds, "offload_param"))


def compile_mode_of(asked: str, stage: int, device: str, fetches_weights: bool = False) -> str:
    """What engine.compile means: with auto as much as can be compiled on a GPU at ZeRO 1 to 3, elsewhere nothing.

    device: cuda | cpu. fetches_weights: between two blocks of a tower weights come and go: a block, which is fetched
    whole, is the most.
    """
    if asked == AUTO:
        asked = TOWER if device == "cuda" and stage > 0 else NO_COMPILE
    return BLOCK if asked == TOWER and fetches_weights else asked


def is_teacher_sharded(placement: str, stage: int, world_size: int) -> bool:
    """Whether teacher.placement means a teacher in shards: auto at stage 3, unless one rank would hold them all."""
    return placement == "sharded" or (placement == "auto" and stage == 3 and world_size > 1)
