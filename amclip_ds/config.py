"""The settings of a run: composes the parts' dataclasses; loads recipe < yaml < key=value; validates, explains, dumps.

A recipe's name is METHOD-SIZE (`aclip-vitb16`): `recipes/methods/aclip.yaml` and then `recipes/sizes/vitb16.yaml` are
laid over the defaults: a method's published optimizer holds for the published sizes, `tiny` has its own. What a method
lays over a size is in its `sizes`. A yaml of
one's own may begin with `recipe: aclip-vitb16` and change what it likes.
Every mistake is a UserError of one line that names the key and, where it is misspelt, the nearest valid one.
"""

import contextlib
import difflib
import sys
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from amclip_ds import configfile, plain_yaml, run_files
from amclip_ds import plugins as own
from amclip_ds.checkpoint import CheckpointConfig
from amclip_ds.checkpoint.step_folders import list_steps
from amclip_ds.compat import COMPAT
from amclip_ds.data.config import DataConfig, View, ViewConfig
from amclip_ds.engine.ds_config import EngineConfig, read_ds_config
from amclip_ds.errors import LocalSettingsError, SettingsError, UserError, in_one_line
from amclip_ds.masks import MASKS, NONE, MaskConfig, ViewMask, masks_of_views, needs_of
from amclip_ds.masks.text import TEXT_MASKS
from amclip_ds.masks.units import num_kept, num_kept_units, num_units
from amclip_ds.model.config import (
    FLAT_OBJECTIVES,
    DistillConfig,
    HeadsConfig,
    LossConfig,
    ModelConfig,
    TeacherConfig,
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
OVER_SIZES = "sizes"  # of a method's yaml: what it lays over a size, or over the `others`
NEEDED = "<needed>"  # in a recipe: a value that must be given
WHAT_IS_NEEDED = {"model.init_from": "name the run that it continues from, a checkpoint or safetensors"}
YEARS = 10**9  # seconds: the system's clocks and timers take no more
SIZES = {  # the largest value -> the keys that take no more: beyond, a run would not fail here but fill a machine
    10**10: "run.steps optim.warmup_steps",
    YEARS: "data.timeout_s checkpoint.timeout_s checkpoint.every_minutes preemption.forced_exit_s"
    " preemption.before_limit_s watchdog.step_timeout_s watchdog.phase_timeout_s ownership.heartbeat_s"
    " ownership.stale_s data.stage_gb",
    2**31: "data.shuffle_window",
    2**24: "batch.global_size batch.per_gpu model.text.vocab_size guards.spike_window",
    10**6: "run.epochs optim.lr optim.weight_decay optim.eps optim.warmup_start_lr optim.final_lr"
    " optim.clip_grad_norm optim.vision_lr_scale optim.text_lr_scale loss.contrastive_weight loss.o2o_weight"
    " loss.o2e_weight loss.o2o_temperature eval.batch_size loss.occlusion.weight loss.occlusion.temperature"
    " loss.occlusion.kappa loss.patches.weight loss.mlm.weight loss.clipkd.weight loss.clipkd.feature_weight"
    " loss.clipkd.interactive_weight loss.clipkd.relation_weight loss.detailclip.weight loss.detailclip.patch_weight"
    " loss.detailclip.cls_weight loss.detailclip.pixel_weight loss.detailclip.student_temperature"
    " loss.detailclip.teacher_temperature loss.detailclip.patch_temperature mask.attentive_noise.noise"
    " mask.salience.noise mask.centered.sigma2",
    2**17: "heads.hidden_dim heads.output_dim loss.clipkd.project_to loss.detailclip.prototypes"
    " loss.detailclip.hidden_dim"
    " loss.detailclip.bottleneck_dim",
    2**16: "model.vision.width model.text.width model.embed_dim model.text.context_length data.prefetch"
    " data.open_shards data.text_mask.tokens",
    2**13: "model.vision.image_size model.vision.patch_size model.vision.heads model.text.heads",
    1000: "run.profile model.vision.depth model.text.depth loss.patches.depth loss.detailclip.depth"
    " loss.detailclip.decoder_heads data.workers",
    100: "model.vision.mlp_ratio model.text.mlp_ratio data.num_views data.views",
    1: "optim.momentum",
}
LIMITS = {key: most for most, keys in SIZES.items() for key in keys.split()}


@dataclass
class RunConfig:
    """The run as a whole: where it is, how long it is, what makes it repeatable."""

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
    profile: int | None = None
    """So many steps (after the first 6) are profiled: RUN/profile/summary.txt and trace.json.gz; null: none."""

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "profile"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"run.{name}: {value} is not above 0")
        if self.seed < 0:
            raise ValueError(f"run.seed: {self.seed} is below 0")
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
class EvalConfig:
    """Evaluation during training."""

    data: str | None = field(default=None, metadata={"shards": True})
    """Folders to evaluate on, joined by `::`: CLIP_benchmark's layout (classnames.txt, test/0.tar, ...), an image
    folder (a folder a class, wnids too; below `val` or not), or tars of pairs for retrieval; null: none."""
    every_steps: int | None = None
    """Evaluate every so many steps; null: after the last step alone."""
    batch_size: int = 64
    """Images, or texts, in one forward; the numbers do not depend on how many ranks share the batches."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"eval.batch_size: {self.batch_size} is below 1")
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"eval.every_steps: {self.every_steps} is below 1 (null: after the last step alone)")


@dataclass
class TrainConfig:
    """Everything that decides a run."""

    compat: str = "paper"
    """`paper`: what the papers mean; `release`: what published code does: A-CLIP's (pairing, teacher box, texts' EMA),
    SLIP's (gathering), CLIPF's (budget of words). Others' have keys: mask.cluster.rule, mask.pgs.*, loss.clipkd.*."""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
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
    plugins: list[str] = field(default_factory=list)
    """What --plugin brought, `NAME sha256:HASH` each; recorded, not to be set."""

    def __post_init__(self) -> None:
        if self.compat not in COMPAT:
            raise ValueError(f"compat: {self.compat!r} is neither 'paper' nor 'release'")


@dataclass(frozen=True)
class BatchPlan:
    """How the global batch falls onto a world: global_size = world_size x local; local in `splits` of at most micro."""

    local: int
    micro: int
    splits: int

    @property
    def split_in_words(self) -> str:
        """`3 splits of 32`; of a batch that does not divide so, `3 splits of 32 or less`."""
        return f"{self.splits} splits of {self.micro}{' or less' if self.local % self.micro else ''}"


def plan_batch(batch: BatchConfig, world_size: int) -> BatchPlan:
    """Shares the global batch out. Raises UserError, with the arithmetic, where it does not divide."""
    local, rest = divmod(batch.global_size, world_size)
    if rest or local == 0:
        below = max(
            (n for n in range(1, min(world_size, batch.global_size) + 1) if batch.global_size % n == 0), default=1
        )
        near = max(1, round(batch.global_size / world_size)) * world_size
        raise SettingsError(
            f"batch.global_size: {batch.global_size} = {world_size} ranks x {local} + {rest} does not divide;"
            f" use {near}, or {below} ranks"
        )
    micro = split_of(local, batch.per_gpu)
    return BatchPlan(local=local, micro=micro, splits=-(-local // micro))


def split_of(local: int, per_gpu: int) -> int:
    """Samples of a rank's batch to hold at a time, at most per_gpu: equal splits, where they hold more than half of
    that; else as few splits as there can be, the last of which is smaller (a batch of 683 divides by nothing but 1)."""
    most = min(per_gpu, local)
    even = max(n for n in range(1, most + 1) if local % n == 0)
    return even if 2 * even > most else -(-local // -(-local // most))


def count_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """The run's length in optimizer steps. Raises SettingsError where it comes to none."""
    if config.run.steps is not None:
        return config.run.steps
    if steps_per_epoch < 1:
        raise SettingsError(f"batch.global_size: {config.batch.global_size} is more than an epoch's samples; take less")
    steps = round((config.run.epochs or 0) * steps_per_epoch)
    if steps < 1:
        raise SettingsError(
            f"run.epochs: {config.run.epochs} of an epoch of {steps_per_epoch} steps is no step; take more"
        )
    return steps


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
        raise SettingsError(in_one_line(error)) from None


def recipe_names() -> list[str]:
    """Every METHOD-SIZE."""
    methods = sorted(path.stem for path in (RECIPES / "methods").glob("*.yaml"))
    return [f"{method}-{size}" for method in methods for size in size_names()]


def size_names() -> list[str]:
    """Every SIZE."""
    return sorted(path.stem for path in (RECIPES / "sizes").glob("*.yaml"))


def method_of_recipe(recipe: str) -> str | None:
    """The METHOD of a shipped recipe's name; None for anything else."""
    for size in sorted(size_names(), key=len, reverse=True):
        method = recipe.removesuffix(f"-{size}")
        if method != recipe and "/" not in recipe and (RECIPES / "methods" / f"{method}.yaml").is_file():
            return method
    return None


def shipped_towers() -> set[str]:
    """The vision towers of the recipes, whose names need no looking up."""
    return {plain_yaml.read(path)["model"]["vision"]["name"] for path in (RECIPES / "sizes").glob("*.yaml")}


def load(
    recipe: str, overrides: list[str] | tuple[str, ...] = (), plugins: list[str] | tuple[str, ...] = ()
) -> TrainConfig:
    """The typed settings of a recipe (a name, or the path of a yaml) with `key=value` overrides laid over it.

    Of run.steps and run.epochs the one that is given last holds: on the command line, else in the outermost yaml.
    plugins: of --plugin. They are imported, as are installed ones of which a word of `overrides` names a mask or an
    objective; what a yaml names is not. What is refused of new runs (_refusals) is not of one that has begun so.
    """
    if not isinstance(overrides, list | tuple) or not all(isinstance(word, str) for word in overrides):
        raise UserError(f"overrides: {overrides!r:.80} is no list of texts like 'data.train=/data/cc12m'")
    own.load(plugins)
    layers = _layers(recipe)
    words = dict(word.partition("=")[::2] for word in overrides)
    own.load_installed(name for key, name in _named_parts(words).items() if not _is_known(key, name))
    for source, layer in layers:
        _check_plugins(layer.pop("plugins", []), source)
    _check_parts(words, "")
    for source, layer in layers:
        _check_parts(plain_yaml.flat(layer), f" (in {source})")
    loaded = _build(recipe, layers, overrides)
    loaded.plugins = own.identities()
    _check_together(loaded)
    if refused := _refusals(loaded):
        before = _refusals_before(recipe, loaded.run.out)
        for refusal in refused:
            if refusal not in before:
                raise SettingsError(refusal)
    return loaded


def _refusals_before(recipe: str, out: str) -> list[str]:
    """What would be refused of the run whose own config.yaml the recipe is, and of the one of which run.out has a
    checkpoint: an older version has trained it so, and it is repeated, read and resumed as it was."""
    file, folder = Path(recipe), Path(out)
    is_of_run = file.name == run_files.CONFIG and (file.parent / run_files.VERSIONS).is_file()
    resumes = bool(list_steps(folder / run_files.CHECKPOINTS))
    found: list[str] = []
    for begun in [file] * is_of_run + [folder / run_files.CONFIG] * resumes:
        layers = _layers(str(begun))
        for _, layer in layers:
            layer.pop("plugins", None)  # those that are loaded have brought their keys
        with contextlib.suppress(UserError):  # of a plug-in that is not: nothing of such a run is let pass
            found += _refusals(_build(str(begun), layers, ()))
    return found


def load_run(file: Path) -> TrainConfig:
    """The settings in a run's config.yaml, for whoever reads the run: none of its plug-ins is imported; their masks and
    the keys of their objectives are left out. What would be refused of a run to come (_refusals) is not of one
    that there is."""
    layers = _layers(str(file))
    loaded = _build(str(file), [(source, _without_plugins(layer)) for source, layer in layers], ())
    _check_together(loaded)
    return loaded


def model_of_run(path: Path) -> ModelConfig | None:
    """The model of a run, or of the run that a checkpoint or an export is in; None: there is no such run."""
    for folder in (path, path.absolute().parent.parent):
        if (folder / run_files.CONFIG).is_file():
            return load_run(folder / run_files.CONFIG).model
    return None


def _build(recipe: str, read: list[tuple[str, dict[str, Any]]], overrides: Sequence[str]) -> TrainConfig:
    """read: the yaml layers, each with its source."""
    kind = settings_type()
    known = configfile.keys_and_types(kind)
    layers: list[configfile.Values] = []
    sources: dict[str, str] = {}
    for source, layer in read:
        found = configfile.read_layer(layer, known, source)
        layers.append(_one_length(found, f" (in {source})"))
        sources |= dict.fromkeys(found, source)
    given = configfile.read_overrides(overrides, known, set(configfile.shard_keys(kind)))
    layers.append(_one_length(given, ""))
    for key in given:
        sources.pop(key, None)
    if given.get("plugins"):
        raise SettingsError("plugins: written by the run, not set by hand; name them by --plugin NAME_OR_FILE.py")
    values = dict(ChainMap(*reversed(layers)))
    for key, value in values.items():
        if value == NEEDED:
            where = f"{sources[key]} needs" if key in sources else "this recipe needs"
            raise SettingsError(f"{key}: {where} it; {WHAT_IS_NEEDED.get(key, 'give it a value')}")
    for key, value in values.items():
        if key in LIMITS and value is not None and value > LIMITS[key]:
            raise SettingsError(f"{key}: {value} is above {LIMITS[key]}, more than any run has use for")
    _check_options(values)
    loaded = configfile.merge(kind, layers, sources)
    if not loaded.run.out:
        loaded.run.out = f"runs/{Path(recipe).stem}"
        plain_yaml.refuse_interpolation(loaded.run.out, "run.out")
    return loaded


def settings_type() -> type[TrainConfig]:
    """TrainConfig with the options of every mask as mask.NAME.*, and those of objectives as loss.NAME.*."""
    masks, losses = _sections()
    return _settings_type(tuple(masks.items()), tuple(losses.items()))


def _sections() -> tuple[dict[str, type], dict[str, type]]:
    """(of `mask`, of `loss`): name -> options. Of objectives, which load torch, once something has asked for them."""
    masks = {name: mask.options for name, mask in MASKS.items() if mask.options is not None}
    own_keys = (*FLAT_OBJECTIVES, *LossConfig.__dataclass_fields__)
    return masks, {name: kind.Options for name, kind in _loaded_objectives().items() if name not in own_keys}


@cache
def _settings_type(masks: tuple[tuple[str, type], ...], losses: tuple[tuple[str, type], ...]) -> type[TrainConfig]:
    sections: dict[str, type] = {}
    for name, base, options in (("mask", MaskConfig, masks), ("loss", LossConfig, losses)):
        if options:
            sections[name] = configfile.with_sections(base, dict(options))
    return configfile.with_sections(TrainConfig, sections) if sections else TrainConfig


def _loaded_objectives() -> dict[str, Any]:
    objectives = sys.modules.get("amclip_ds.objectives")
    return objectives.OBJECTIVES if objectives is not None else {}


def _named_parts(keys: Mapping[str, Any]) -> dict[str, str]:
    """Key -> the mask or objective that it names: mask.strategy=NAME, mask.NAME.*, loss.NAME.*."""
    found: dict[str, str] = {}
    for key, value in keys.items():
        section, *rest = key.split(".")
        if f".{key}".endswith((".mask.strategy", ".text_mask.strategy")):
            found |= {key: str(value)} if value else {}  # empty: a view's that is left out
        elif section in ("mask", "loss") and len(rest) > 1:
            found[key] = rest[0]
    return found


def _is_known(key: str, name: str) -> bool:
    if not key.startswith("loss."):
        return name in (NONE, *_masks_of(key))
    return name in (*LossConfig.__dataclass_fields__, *_loaded_objectives())


def _masks_of(key: str) -> Iterable[str]:
    """The names that a key may have."""
    return TEXT_MASKS if key.startswith("data.text_mask.") else MASKS


def _check_parts(keys: Mapping[str, Any], where: str) -> None:
    """Raises SettingsError for a mask or an objective that there is not."""
    for key, name in _named_parts(keys).items():
        if _is_known(key, name):
            continue
        if key.startswith("loss."):
            import amclip_ds.objectives  # noqa: F401  # ours may have no section in LossConfig

            if _is_known(key, name):
                continue
        if key.endswith(".strategy"):
            known = ", ".join((NONE, *_masks_of(key)))
            raise SettingsError(f"{key}: {name!r} is none of {known}; {own.hint(name)}{where}")
        raise SettingsError(f"{configfile.unknown(key, keys_and_types())}; {own.hint(name)}{where}")


def _check_options(values: configfile.Values) -> None:
    """Raises SettingsError with what the options of a mask or an objective say of these values."""
    for section, kinds in zip(("mask", "loss"), _sections()):
        for name, kind in kinds.items():
            prefix = f"{section}.{name}."
            given = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
            try:
                configfile.merge(kind, [given], {})
            except Exception as error:  # it may be a plug-in's own code
                text = in_one_line(error, 300)
                raise SettingsError(text if text.startswith(prefix) else f"{prefix[:-1]}: {text}") from None


def _check_plugins(recorded: Any, source: str) -> None:
    """Raises SettingsError for a run's config.yaml whose plug-ins are not loaded."""
    loaded = {identity.split(" ")[0] for identity in own.identities()}
    for identity in recorded if isinstance(recorded, list) else [recorded]:
        name = str(identity).split(" ")[0]
        if name not in loaded:
            raise SettingsError(
                f"plugins: the run of these settings had the plug-in {name}; add --plugin with its file or name, which"
                f" no yaml can do (in {source})"
            )


def _without_plugins(layer: dict[str, Any]) -> dict[str, Any]:
    """A run's settings, where it had plug-ins without the mask and the objectives that are not ours."""
    if not layer.get("plugins"):
        return layer
    known = configfile.keys_and_types(settings_type())
    kept = {name: value for name, value in layer.items() if name != "plugins"}
    for section in ("mask", "loss"):
        held = layer.get(section)
        if isinstance(held, dict):
            kept[section] = {
                name: value
                for name, value in held.items()
                if any(f"{key}.".startswith(f"{section}.{name}.") for key in known)
            }
            if section == "mask":
                _leave_out_own_mask(kept[section])
    data: Any = kept["data"] if isinstance(kept.get("data"), dict) else {}
    text_mask, views = data.get("text_mask"), data.get("views")
    if isinstance(text_mask, dict) and not _is_known("data.text_mask.strategy", str(text_mask.get("strategy"))):
        text_mask["strategy"] = NONE
    for view in views if isinstance(views, list) else []:
        if isinstance(view, dict) and isinstance(view.get("mask"), dict):
            _leave_out_own_mask(view["mask"])
    return kept


def _leave_out_own_mask(section: dict[str, Any]) -> None:
    """In place: a mask that is not ours becomes none."""
    name = section.get("strategy")
    if name and not _is_known("mask.strategy", str(name)):
        section["strategy"] = NONE


def _one_length(layer: configfile.Values, where: str) -> configfile.Values:
    """A length that a layer gives replaces the one below it, whichever of the two keys that used."""
    lengths = {"run.steps", "run.epochs"}
    given = {key for key in lengths if layer.get(key) is not None}
    if given == lengths:
        raise SettingsError(f"run.steps and run.epochs: give one of them{where}")
    return dict.fromkeys(lengths) | layer if given else layer


def dump(config: TrainConfig) -> str:
    """The resolved settings as yaml; `load` of it gives the same settings back. `plugins` is there if there are any."""
    return configfile.dump(config, leave_out=() if config.plugins else ("plugins",))


def explain(config: TrainConfig) -> list[tuple[str, Any, str]]:
    """Each key with its value and what it means, from the docstrings beside the fields; the views in full."""
    masks = masks_of_views(config.mask, config.data.view_masks())
    views = [_in_full(view, mask) for view, mask in zip(config.data.all_views(), masks)]
    resolved = replace(config, data=replace(config.data, views=views))
    return [item for item in configfile.explain(resolved) if item[0] != "plugins"]


def _in_full(view: View, mask: MaskConfig) -> ViewConfig:
    """A view's section with nothing left out but the crop that is another view's."""
    own = ViewMask(**{item.name: getattr(mask, item.name) for item in fields(ViewMask)})
    if view.draws_of is not None:
        return ViewConfig(photometric=view.photometric, same_crop_as=view.draws_of, mask=own)
    return ViewConfig(list(view.scale), list(view.ratio), view.flip, view.photometric, view.colours, mask=own)


def keys_and_types() -> dict[str, Any]:
    """Every dotted key -> its declared type."""
    return configfile.keys_and_types(settings_type())


def _layers(recipe: str, seen: tuple[str, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The yaml layers of a recipe, with the name to blame for a mistake in each."""
    if method := method_of_recipe(recipe):
        size = recipe.removeprefix(f"{method}-")
        layer = plain_yaml.read(RECIPES / "methods" / f"{method}.yaml")
        over_size = layer.pop(OVER_SIZES, {})
        return [
            (f"recipe {method}", layer),
            (f"recipe size {size}", plain_yaml.read(RECIPES / "sizes" / f"{size}.yaml")),
            (f"recipe {method}", over_size.get(size, over_size.get("others", {}))),
        ]
    path = Path(recipe)
    if not recipe.endswith((".yaml", ".yml")):
        raise _no_recipe(recipe, path)
    if not path.exists():
        raise LocalSettingsError(f"recipe {recipe}: no such file")
    if recipe in seen:
        raise SettingsError(f"recipe {recipe}: is based on itself: {' -> '.join([*seen, recipe])}")
    layer = plain_yaml.read(path) or {}
    if not isinstance(layer, dict):
        raise SettingsError(f"{path}: expected `key: value` lines")
    base = layer.pop("recipe", None)
    if base is not None and not isinstance(base, str):
        raise SettingsError(f"recipe: {base!r} is no name of a recipe and no path of a yaml (in {path})")
    return (_layers(base, (*seen, recipe)) if base else []) + [(str(path), layer)]


def _no_recipe(recipe: str, path: Path) -> UserError:
    """What to type instead of a word that is neither a recipe nor a yaml."""
    if "=" in recipe or not recipe:
        return SettingsError(f"{recipe!r}: the recipe comes first (`amclip recipes` lists them), then key=value words")
    if (path / run_files.CONFIG).is_file():
        return LocalSettingsError(f"recipe {recipe}: a run's folder; its settings are {path / 'config.yaml'}")
    if path.is_dir():
        return LocalSettingsError(f"recipe {recipe}: a folder; give a recipe's name, or the path of a yaml")
    if path.is_file():
        return LocalSettingsError(f"recipe {recipe}: not a yaml by its name; give a .yaml file with `key: value` lines")
    word, names = recipe.lower().replace("_", "-"), recipe_names()
    parts = [name for name in names if name.startswith(word + "-") or name.endswith("-" + word)]
    near = parts[:3] or difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return SettingsError(f"recipe {recipe!r} is not known; {hint}`amclip recipes` lists them")


def _check_together(config: TrainConfig) -> None:
    """What no section can see alone. Raises SettingsError."""
    if config.run.steps is None and config.run.epochs is None:
        raise SettingsError("run.steps: give it, or run.epochs")
    try:
        grid = config.model.vision.grid
        _check_masks(config, grid)
    except ValueError as error:
        raise SettingsError(in_one_line(error)) from None
    half = config.teacher.image_size(config.model.vision.image_size)
    try:
        patch_grid(config.model.vision, half)
    except ValueError:
        raise SettingsError(
            f"teacher.resolution: half of model.vision.image_size={config.model.vision.image_size} is {half} pixels, no"
            f" multiple of the patch size; set teacher.resolution=full, or another model.vision.image_size"
        ) from None
    context, text_mask = config.model.text.context_length, config.data.text_mask
    if text_mask.strategy != NONE and text_mask.tokens > context:
        raise SettingsError(
            f"data.text_mask.tokens: {text_mask.tokens} is above model.text.context_length, {context}: nothing would go"
        )


def _refusals(config: TrainConfig) -> list[str]:
    """Why a run could not train, or not as its settings say."""
    found = []
    for check in (_check_rate, _check_disjoint, _check_read_views):
        try:
            check(config)
        except SettingsError as error:
            found.append(str(error))
    return found


def _check_rate(config: TrainConfig) -> None:
    """Raises SettingsError for a learning rate that would rise after its warm-up."""
    optim = config.optim
    if optim.final_lr > optim.lr > 0:
        raise SettingsError(
            f"optim.final_lr: {optim.final_lr:g} is above optim.lr, {optim.lr:g}: the rate would rise; set"
            f" optim.final_lr=0"
        )


def _check_masks(config: TrainConfig, grid: int) -> None:
    """Raises ValueError for a view's mask that the patch grid cannot have."""
    own = config.data.view_masks()
    masks = masks_of_views(config.mask, own)
    for place, mask in enumerate(masks):
        if mask.strategy == NONE:
            continue
        try:
            units = num_units(grid, mask.unit)
        except ValueError as error:
            raise ValueError(f"data.views.{place}.{error}" if own[place].unit is not None else str(error)) from None
        name = min(("keep_ratio", "final_keep_ratio"), key=lambda name: getattr(mask, name) or 1.0)
        least, key = getattr(mask, name), _mask_key(own[place], place, name)
        if units * least < 1 - 1e-9:
            raise ValueError(
                f"{key}: {least} of {units} units of {mask.unit} x {mask.unit} patches is less than one; at"
                f" least {1 / units:.4g}, or a smaller {_mask_key(own[place], place, 'unit')}"
            )
        kept = num_kept_units(units, mask.at_most().keep_ratio)
        if MASKS[mask.strategy].disjoint and masks.count(mask) * kept > units:
            name = max(("keep_ratio", "final_keep_ratio"), key=lambda name: getattr(mask, name) or 0.0)
            raise ValueError(
                f"{_mask_key(own[place], place, name)}: {masks.count(mask)} views of {kept} units each, none in common,"
                f" are more than the {units} that mask.strategy={mask.strategy} can share out; keep at most"
                f" 1/{masks.count(mask)}"
            )


def _mask_key(own: ViewMask, place: int, name: str) -> str:
    """Where a view's mask has a setting from: its own, or that of all views."""
    return f"mask.{name}" if getattr(own, name) is None else f"data.views.{place}.mask.{name}"


def _check_disjoint(config: TrainConfig) -> None:
    """Raises SettingsError for views of a disjoint mask that may share patches: of different masks, or crops."""
    views, masks = config.data.all_views(), masks_of_views(config.mask, config.data.view_masks())
    first_of: dict[str, int] = {}
    for place, mask in enumerate(masks):
        if mask.strategy == NONE or not MASKS[mask.strategy].disjoint:
            continue
        first = first_of.setdefault(mask.strategy, place)
        if mask != masks[first]:
            raise SettingsError(
                f"data.views.{place}.mask: views of mask.strategy={mask.strategy} share one order; give them one"
                f" keep_ratio, unit and schedule"
            )
        crops = [view if views[view].draws_of is None else views[view].draws_of for view in (first, place)]
        if crops[0] != crops[1]:
            raise SettingsError(
                f"data.views.{place}.same_crop_as: views of mask.strategy={mask.strategy} are parts of one crop; set it"
                f" to {crops[0]}"
            )


def _check_read_views(config: TrainConfig) -> None:
    """Raises SettingsError for an objective that reads a view that is not there, or a text that nothing makes; and for
    a text that nothing reads."""
    loss, num_views = config.loss, config.data.num_views
    has_masked_text = config.data.text_mask.strategy != NONE
    reads_masked_text = loss.contrastive_weight > 0 and loss.text == "masked"
    for key, views in (
        ("loss.views", loss.views),
        ("loss.o2o_views", loss.o2o_views),
        ("loss.o2e_views", loss.o2e_views),
    ):
        _check_places(key, views, num_views)
    if loss.o2o_weight > 0 and len(loss.o2o_views or range(num_views)) != 2:
        if loss.o2o_views:
            raise SettingsError(f"loss.o2o_views: {loss.o2o_views} are not two views, which this loss compares")
        raise SettingsError(
            f"loss.o2o_weight: this loss needs data.num_views=2, not {num_views}, or two of them in loss.o2o_views; or"
            f" set it to 0"
        )
    for name, options in vars(loss).items():
        if getattr(options, "weight", 0):
            _check_places(f"loss.{name}.views", getattr(options, "views", None), num_views)
    if loss.occlusion.weight > 0 and len(loss.occlusion.views or (0, 1)) != 2:
        raise SettingsError(f"loss.occlusion.views: {loss.occlusion.views} are not two views, which this loss compares")
    if loss.occlusion.weight > 0 and num_views < 2:
        raise SettingsError(f"loss.occlusion.weight: this loss needs data.num_views=2, not {num_views}; or set it to 0")
    _check_starts(loss)
    _check_teacher_view(config)
    reads_frozen = loss.clipkd.weight > 0
    if reads_frozen and not config.distill.teacher:
        raise SettingsError(
            "distill.teacher: loss.clipkd compares with a finished model; name a run, a checkpoint or an export, or set"
            " loss.clipkd.weight=0"
        )
    for name, kind in _loaded_objectives().items():
        options = None if name in FLAT_OBJECTIVES else getattr(loss, name, None)
        if options is None or options.weight == 0:
            continue
        reads_frozen = reads_frozen or kind.reads_frozen()
        if kind.reads_frozen() and not config.distill.teacher:
            raise SettingsError(
                f"distill.teacher: loss.{name} compares with a finished model; name a run, a checkpoint or an export,"
                f" or set loss.{name}.weight=0"
            )
        if kind.reads_average() and kind.sees != config.teacher.sees:
            raise SettingsError(
                f"teacher.sees: loss.{name} compares with what the teacher sees under teacher.sees={kind.sees}; set it,"
                f" or loss.{name}.weight=0"
            )
        if not getattr(options, "views", None) and max(kind.views or (0,)) >= num_views:
            raise SettingsError(
                f"loss.{name}.weight: this objective reads the views {', '.join(map(str, kind.views))} of data.views,"
                f" and there are {num_views}, from 0; add what is missing, name others in loss.{name}.views, or set it"
                f" to 0"
            )
        reads_masked_text = reads_masked_text or kind.text_pass_of(options) == "masked"
        if kind.text_pass_of(options) == "masked" and not has_masked_text:
            raise SettingsError(
                f"loss.{name}.weight: this objective reads masked texts; set data.text_mask.strategy, or it to 0"
            )
    if config.distill.teacher and not reads_frozen:
        raise SettingsError("distill.teacher: no objective of this run reads it; leave it out, or give one a weight")
    if has_masked_text and not reads_masked_text:
        why = "loss.text=plain" if loss.text == "plain" else "loss.contrastive_weight=0"
        raise SettingsError(f"data.text_mask.strategy: nothing reads masked texts ({why}); leave one out")


def _check_starts(loss: LossConfig) -> None:
    """Raises SettingsError for a run that would begin without any loss."""
    starts = {name: options.start for name, options in vars(loss).items() if getattr(options, "weight", 0)}
    if loss.contrastive_weight or loss.o2o_weight or loss.o2e_weight or 0 in starts.values():
        return
    if not starts:
        raise SettingsError("loss.contrastive_weight: no objective has a weight; set it, or another's, above 0")
    raise SettingsError(f"loss.{next(iter(starts))}.start: nothing else has a weight before it begins; set it to 0")


def _check_teacher_view(config: TrainConfig) -> None:
    """Raises SettingsError for a teacher that sees no view, and for what cannot be said of the one it sees."""
    views, looked_at, loss = config.data.all_views(), config.teacher.view, config.loss
    masks = masks_of_views(config.mask, config.data.view_masks())
    if looked_at is not None:
        _check_places("teacher.view", [looked_at], len(views))
        if any(view.flip for view in views) and any("scores" in needs_of(mask) for mask in masks):
            raise SettingsError(
                "teacher.view: scores of a view cannot be seen from mirrored ones (data.views.N.flip); leave out one"
            )
    _check_looks_at_views(config)
    if loss.patches.weight == 0:
        return
    read = loss.patches.views or [1]
    _check_places("loss.patches.views", read, len(views))
    for place in read:
        source = place if views[place].draws_of is None else views[place].draws_of
        first = views[looked_at].draws_of if looked_at is not None else None
        if looked_at is None or source != (looked_at if first is None else first):
            raise SettingsError(
                f"teacher.view: loss.patches compares view {place} with what the teacher sees in the same crop; set it"
                f" to {source}, the view of that crop, or loss.patches.weight=0"
            )
        _check_removes(config, place, "patches", loss.patches.start, "loss.patches.weight=0")


def _check_removes(config: TrainConfig, place: int, objective: str, start: float, instead: str) -> None:
    """Raises SettingsError for a view of which an objective predicts removed patches, and whose mask at some time from
    `start` on, a share of the run, removes none. instead: what else can be set."""
    own = config.data.view_masks()
    mask, grid = masks_of_views(config.mask, own)[place], config.model.vision.grid
    fullest = max((mask.at(start), mask.at(1.0)), key=lambda at: num_kept(at, grid))
    if num_kept(fullest, grid) < grid**2:
        return
    said = f"loss.{objective}.weight: view {place} keeps every token"
    if mask.strategy == NONE:
        raise SettingsError(f"{said}; set data.views.{place}.mask.strategy, or {instead}")
    name = "final_keep_ratio" if (mask.final_keep_ratio or 0.0) > mask.keep_ratio else "keep_ratio"
    key = _mask_key(own[place], place, name)
    units = num_units(grid, mask.unit)
    raise SettingsError(f"{said}: {key}={getattr(mask, name):g} of {units} units is all; set it lower, or {instead}")


def _check_looks_at_views(config: TrainConfig) -> None:
    """Raises SettingsError for an objective whose teacher must see all views, and for one for which it must not."""
    views, loss, detail = config.data.all_views(), config.loss, config.loss.detailclip
    looks_at_views = config.teacher.sees == "views"
    of_crop = {"loss.o2e_weight": loss.o2e_weight, "loss.patches.weight": loss.patches.weight}
    for key, weight in of_crop.items():
        if weight and looks_at_views:
            raise SettingsError(
                f"teacher.sees: {key} compares with one crop that the teacher sees, not with views; set {key}=0, or"
                f" teacher.sees=crop"
            )
    if detail.weight == 0:
        return
    if not looks_at_views:
        raise SettingsError(
            "teacher.sees: loss.detailclip compares with what the teacher sees of the views; set teacher.sees=views"
        )
    read = detail.views or list(range(len(views)))
    if detail.cls_weight and len(read) < 2:
        raise SettingsError(
            f"loss.detailclip.cls_weight: one view is compared with another, and there is {len(read)}; set"
            f" data.num_views=2, or it to 0"
        )
    for place in read if detail.patch_weight or detail.pixel_weight else []:
        off = "loss.detailclip.patch_weight=0 loss.detailclip.pixel_weight=0"
        _check_removes(config, place, "detailclip", detail.start, off)


def _check_places(key: str, views: list[int] | None, num_views: int) -> None:
    for view in views or []:
        if not 0 <= view < num_views:
            raise SettingsError(f"{key}: there is no view {view}; there are {num_views}, from 0 to {num_views - 1}")
    if views is not None and (not views or len(set(views)) < len(views)):
        raise SettingsError(f"{key}: {views} needs at least one view, and each once")
