"""The settings of a run: composes the rooms' dataclasses; loads recipe < yaml < key=value; validates, explains, dumps.

A recipe's name is METHOD-SIZE (`aclip-vitb16`): `recipes/sizes/vitb16.yaml` and then `recipes/methods/aclip.yaml` are
laid over the defaults. A yaml of one's own may begin with `recipe: aclip-vitb16` and change what it likes.
Every mistake is a UserError of one line that names the key and, where it is misspelt, the nearest valid one.
"""

import ast
import dataclasses
import difflib
import inspect
import os
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from amclip_ds import plain_yaml
from amclip_ds.checkpoint import CheckpointConfig
from amclip_ds.data.config import DataConfig
from amclip_ds.engine.ds_config import EngineConfig, read_ds_config
from amclip_ds.errors import UserError
from amclip_ds.evaluate import EvalConfig
from amclip_ds.loss import LossConfig
from amclip_ds.model.config import (
    HeadsConfig,
    MaskConfig,
    ModelConfig,
    TeacherConfig,
    needs_scores,
    num_units,
    patch_grid,
)
from amclip_ds.optim import OptimConfig
from amclip_ds.record import LogConfig
from amclip_ds.resilience.config import (
    GuardsConfig,
    OwnershipConfig,
    PreemptionConfig,
    WatchdogConfig,
    read_duration,
)

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class RunConfig:
    """The run as a whole: where it lies, how long it is, what makes it repeatable."""

    out: str = ""
    """The run's folder; empty: runs/RECIPE."""
    steps: int | None = None
    """Length in optimizer steps; give this or run.epochs."""
    epochs: float | None = None
    """Length in passes over data.train; give this or run.steps."""
    seed: int = 0
    """Keys the initial weights, the order of data, augmentation and random masks."""
    deterministic: bool = False
    """True: deterministic kernels, so that the same config, seed and world repeat bit for bit (slower on a GPU)."""
    log_sample_ids: bool = False
    """True: also write sample_ids.jsonl, the ids of every step in global order."""
    time_limit: str | None = None
    """Wall-clock limit, `HH:MM:SS` or `D-HH:MM:SS`: saves and stops (code 75) before it; else the Slurm job's own."""

    def __post_init__(self) -> None:
        for name in ("steps", "epochs"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"run.{name}: {value} is not above 0")
        if self.time_limit is not None:
            read_duration(self.time_limit, "run.time_limit")


@dataclass
class BatchConfig:
    """The batch: one constant for the run; what each GPU holds at a time follows from the world size."""

    global_size: int = 4096
    """Samples of one optimizer step over all ranks: a constant of the run, on any number of GPUs."""
    per_gpu: int = 256
    """Ceiling of the samples whose activations a GPU holds at once; the rest is accumulated (negatives stay global)."""

    def __post_init__(self) -> None:
        for name in ("global_size", "per_gpu"):
            if getattr(self, name) < 1:
                raise ValueError(f"batch.{name}: {getattr(self, name)} is below 1")


@dataclass
class TrainConfig:
    """Everything that decides a run."""

    compat: str = "paper"
    """`paper`: what the paper means; `release`: what its published code does (pairing, teacher box, EMA)."""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    preemption: PreemptionConfig = field(default_factory=PreemptionConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    ownership: OwnershipConfig = field(default_factory=OwnershipConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if self.compat not in ("paper", "release"):
            raise ValueError(f"compat: {self.compat!r} is neither 'paper' nor 'release'")


@dataclass(frozen=True)
class BatchPlan:
    """How the global batch falls onto a world: global_size = world_size x local = world_size x splits x micro."""

    local: int
    micro: int
    splits: int


def plan_batch(batch: BatchConfig, world_size: int) -> BatchPlan:
    """Shares the global batch out. Raises UserError, with the arithmetic, where it does not divide."""
    local, rest = divmod(batch.global_size, world_size)
    if rest or local == 0:
        below = max((n for n in range(1, world_size + 1) if batch.global_size % n == 0), default=1)
        near = max(1, round(batch.global_size / world_size)) * world_size
        raise UserError(
            f"batch.global_size: {batch.global_size} = {world_size} ranks x {local} + {rest} does not divide;"
            f" use {near}, or {below} ranks"
        )
    micro = max(n for n in range(1, min(batch.per_gpu, local) + 1) if local % n == 0)
    return BatchPlan(local=local, micro=micro, splits=local // micro)


def needs_teacher(config: TrainConfig) -> bool:
    """Whether anything of the run looks at the teacher: its scores, or its features."""
    return needs_scores(config.mask.strategy) or config.loss.o2e_weight > 0


def check_buildable(config: TrainConfig) -> None:
    """Reads DeepSpeed's file and builds the vision tower's skeleton, without weights. Raises UserError where either is
    not possible: the cheap mistakes come to light before ranks meet and shards are indexed."""
    import torch

    from amclip_ds.model.vision import build_vit

    read_ds_config(config.engine)
    try:
        with torch.device("meta"):
            build_vit(config.model.vision)
    except ValueError as error:
        raise UserError(_one_line(error)) from None


def recipe_names() -> list[str]:
    """Every METHOD-SIZE, methods in the order of the paper's table."""
    sizes = sorted(path.stem for path in (RECIPES / "sizes").glob("*.yaml"))
    methods = sorted(path.stem for path in (RECIPES / "methods").glob("*.yaml"))
    return [f"{method}-{size}" for method in methods for size in sizes]


def load(recipe: str, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """The typed settings of a recipe (a name, or the path of a yaml) with `key=value` overrides laid over it."""
    config = OmegaConf.structured(TrainConfig)
    for source, layer in _layers(recipe):
        config = _merge(config, layer, source)
    for override in overrides:
        config = _merge(config, _parse_override(override), override)
    try:
        loaded = typing.cast(TrainConfig, OmegaConf.to_object(config))
    except ValueError as error:
        raise UserError(_one_line(error)) from None
    if not loaded.run.out:
        loaded.run.out = f"runs/{Path(recipe).stem}"
    _check_together(loaded)
    return loaded


def dump(config: TrainConfig) -> str:
    """The resolved settings as yaml; `load` of it gives the same settings back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def explain(config: TrainConfig) -> list[tuple[str, Any, str]]:
    """Each key with its value and what it means, from the docstrings beside the fields."""
    return list(_explain(config, ""))


def _explain(node: Any, prefix: str) -> typing.Iterator[tuple[str, Any, str]]:
    docs = field_docs(type(node))
    for item in dataclasses.fields(node):
        value = getattr(node, item.name)
        if dataclasses.is_dataclass(value):
            yield from _explain(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value, docs.get(item.name, "")


def field_docs(kind: type) -> dict[str, str]:
    """Field name -> the string literal that follows it in the source of a dataclass."""
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(kind)).body[0]).body
    docs = {}
    for statement, after in zip(body, body[1:]):
        is_doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and is_doc:
            docs[statement.target.id] = " ".join(str(typing.cast(ast.Constant, after.value).value).split())  # type: ignore[attr-defined]
    return docs


def keys_and_types(kind: type = TrainConfig, prefix: str = "") -> dict[str, Any]:
    """Every dotted key -> its declared type."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            found |= keys_and_types(typing.cast(type, hint), f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = hint
    return found


def _layers(recipe: str) -> list[tuple[str, dict[str, Any]]]:
    """The yaml layers a recipe stands for, with the name to blame for a mistake in each."""
    if recipe.endswith((".yaml", ".yml")):
        path = Path(recipe)
        if not path.is_file():
            raise UserError(f"recipe {recipe}: no such file")
        layer = _read_yaml(path)
        base = layer.pop("recipe", None)
        if base is None:
            return [(str(path), layer)]
        if not isinstance(base, str) or base.endswith((".yaml", ".yml")):
            raise UserError(f"{path}: recipe: {str(base)[:60]!r} is no recipe's name; `amclip recipes` lists them")
        return [*_layers(base), (str(path), layer)]
    if recipe not in recipe_names():
        raise UserError(f"recipe {recipe!r} is not known{_nearest(recipe, recipe_names())} `amclip recipes` lists them")
    size = max((path.stem for path in (RECIPES / "sizes").glob("*.yaml") if recipe.endswith("-" + path.stem)), key=len)
    method = recipe.removesuffix("-" + size)
    layers = {f"recipe size {size}": f"sizes/{size}.yaml", f"recipe {method}": f"methods/{method}.yaml"}
    return [(name, _read_yaml(RECIPES / file)) for name, file in layers.items()]


def _read_yaml(path: Path) -> dict[str, Any]:
    layer = plain_yaml.read(path) or {}
    if not isinstance(layer, dict):
        raise UserError(f"{path}: expected `key: value` lines")
    return layer


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"{override!r}: expected key=value")
    known = keys_and_types()
    if key not in known:
        inside = [name for name in known if name.startswith(key + ".")]
        if inside:
            raise UserError(f"{key}: a section, not a key; its keys: {', '.join(inside)}")
        raise UserError(f"{key}: unknown key{_nearest(key, list(known))}")
    value: Any = _expand(key, text) if _is_text(known[key]) else plain_yaml.scalar(text)
    if text in ("null", "none", "None") and type(None) in typing.get_args(known[key]):
        value = None
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _expand(key: str, text: str) -> str:
    """Environment variables and ~ in a text value, so that 'data.train=$SCRATCH/...' may be quoted."""
    expanded = os.path.expanduser(os.path.expandvars(text))
    missing = re.search(r"\$\{?([A-Za-z_]\w*)\}?", expanded)
    if missing:
        raise UserError(f"{key}: the environment variable {missing.group(1)} in {text!r} is not set")
    return expanded


def _is_text(hint: Any) -> bool:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return hint is str or (is_union and str in typing.get_args(hint))


def _merge(config: Any, layer: dict[str, Any], source: str) -> Any:
    plain_yaml.refuse_interpolation(layer, source)
    try:
        return OmegaConf.merge(config, layer)
    except ConfigKeyError as error:
        key = str(error.full_key)
        raise UserError(f"{key}: unknown key{_nearest(key, list(keys_and_types()))} (in {source})") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {_one_line(error)} (in {source})") from None
    except ValueError as error:
        raise UserError(f"{_one_line(error)} (in {source})") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())


def _nearest(word: str, known: list[str]) -> str:
    """`; did you mean X?`, comparing whole keys first, then last parts."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not near:
        last = word.rsplit(".", 1)[-1]
        near = [key for key in known if key.rsplit(".", 1)[-1] == last][:1]
        near = near or difflib.get_close_matches(word, known, n=1, cutoff=0.3)
    return f"; did you mean {near[0]}?" if near else ";"


def _check_together(config: TrainConfig) -> None:
    """What no room can see alone. Raises UserError."""
    if config.run.steps is not None and config.run.epochs is not None:
        raise UserError("run.steps and run.epochs: give one of them (the other null)")
    if config.run.steps is None and config.run.epochs is None:
        raise UserError("run.steps: give it, or run.epochs")
    try:
        grid = config.model.vision.grid
        if config.mask.strategy != "none":
            num_units(grid, config.mask.unit)
        if needs_teacher(config) and config.teacher.resolution == "half":
            patch_grid(config.model.vision, config.model.vision.image_size // 2)
    except ValueError as error:
        raise UserError(_one_line(error)) from None
    if config.loss.o2o_weight > 0 and config.data.num_views != 2:
        raise UserError(
            f"loss.o2o_weight: this loss needs data.num_views=2, not {config.data.num_views}; or set it to 0"
        )
