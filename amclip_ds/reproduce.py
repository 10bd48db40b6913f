"""What repeats a run, held against this machine: software, settings, data, plug-ins, ranks; its first steps again."""

import io
import json
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amclip_ds import config as settings
from amclip_ds import plain_yaml, plugins, run_files, run_folder
from amclip_ds.arguments import plugin_words
from amclip_ds.checkpoint import drift, manifest
from amclip_ds.config import TrainConfig
from amclip_ds.doctor import FAIL, OK, WARN, Finding
from amclip_ds.errors import UserError, in_one_line
from amclip_ds.files import MAX_TEXT, is_regular, not_written, read_bytes, read_json, read_text, removed_on_error
from amclip_ds.jsonl import each, encode, read, superseded
from amclip_ds.record.timeline import world_sizes
from amclip_ds.run_files import MAX_METRICS, STEP

EXACT = ("torch", "deepspeed", "numpy", "timm", "transformers", "torchvision", "simplejpeg")  # they change the bits
COMPARED = ("loss", "grad_norm", "lr", "momentum", "logit_scale", "kept_tokens", "samples_seen", "step_applied")
POLL_S = 0.2
LIMIT_S = 1800.0
CAPSULE_STEPS = 200  # of metrics.jsonl and sample_ids.jsonl, which a capsule brings
SMALL = (run_files.CONFIG, run_files.VERSIONS, run_files.CHANGES, run_files.PLAN, run_files.VERDICT, run_files.ATTEMPTS)
WORLD = re.compile(r"steps of \d+ = (\d+) ranks x")
README = """A run of amclip_ds, as far as repeating it needs: settings, versions, hashes of data, its first steps.

  git checkout REVISION                        versions.json, "git"; then git apply changes.diff where there is one
  pip install -e . -c packages.txt
  amclip reproduce FOLDER data.train=SHARDS    what is the same at your site (this folder, unpacked)
  amclip reproduce FOLDER data.train=SHARDS --steps 10       its first steps, bit for bit
"""


def run_settings(run: Path, overrides: list[str], own: list[str]) -> TrainConfig:
    """The run's settings, with plug-ins that the command line names. Raises UserError."""
    run_files.check_is_run(run, ", nor an unpacked capsule")
    if own or overrides:
        return settings.load(str(run / run_files.CONFIG), overrides, own)
    return settings.load_run(run / run_files.CONFIG)


def compare(run: Path, config: TrainConfig) -> Iterator[Finding]:
    """What of the run is the same here. Raises UserError for a folder that is no run."""
    reported = read_json(run / run_files.VERSIONS, dict) if is_regular(run / run_files.VERSIONS) else {}
    here = json.loads(run_folder.describe_versions())
    yield from _software(reported, here)
    yield from _revision(run, reported, here)
    yield from _settings(run, config)
    yield from _plugins(run)
    yield from _data(run, config)
    yield from _world(run, config)


def _software(reported: dict[str, Any], here: dict[str, Any]) -> Iterator[Finding]:
    if not reported:
        yield Finding("software", WARN, "the run left no versions.json", "nothing can be said")
        return
    names = [name for name in here if name in reported and name not in ("git", "command", "platform", "threads")]
    differing = [f"{name} {reported[name]} -> {here[name]}" for name in names if reported[name] != here[name]]
    if not differing:
        yield Finding("software", OK, f"the same {len(names)} versions")
        return
    exact = any(entry.split()[0] in (*EXACT, "cuda", "python") for entry in differing)
    wanted = " ".join(f"{name}=={reported[name]}" for name in names if reported[name] != here[name] and name in EXACT)
    fix = f"pip install {shlex.quote(wanted)}" if wanted else "the same Python and CUDA"
    yield Finding("software", FAIL if exact else WARN, "; ".join(differing), fix)
    if reported.get("platform") != here.get("platform"):
        yield Finding(
            "machine", WARN, f"{reported.get('platform')} -> {here.get('platform')}", "other processors round otherwise"
        )


def _revision(run: Path, reported: dict[str, Any], here: dict[str, Any]) -> Iterator[Finding]:
    then, now = reported.get("git"), here.get("git")
    short = f"{now[:12]}{' with changes' * now.endswith('+changes')}" if now else "no checkout"
    if not isinstance(then, str):
        yield Finding("revision", WARN, "the run was not started from a checkout: its version alone is known")
        return
    changed = _has_patch(run, reported)
    patch = read_text(run / run_files.CHANGES, 2 * run_folder.MAX_CHANGES) if changed else ""
    revision = then.removesuffix("+changes")
    fix = f"git checkout {revision[:12]}" + (
        f" && git apply {shlex.quote(str((run / run_files.CHANGES).resolve()))}" if changed else ""
    )
    if then == now and (patch == run_folder.git_changes() or not then.endswith("+changes")):
        yield Finding("revision", OK, f"{then[:12]}, the same" + (" changes too" if patch else ""))
    elif then.endswith("+changes") and not changed:
        yield Finding("revision", WARN, f"{revision[:12]} with changes that the run did not keep; here {short}", fix)
    else:
        with_patch = f" with {run_files.CHANGES}" if changed else ""
        yield Finding("revision", WARN, f"{revision[:12]}{with_patch}; here {short}", fix)


def _has_patch(run: Path, reported: dict[str, Any]) -> bool:
    """Whether changes.diff belongs to the recorded revision; a start before the last one may have left it."""
    return str(reported.get("git")).endswith("+changes") and is_regular(run / run_files.CHANGES)


def _settings(run: Path, config: TrainConfig) -> Iterator[Finding]:
    from amclip_ds.samples import FILES  # where they are; _data compares what they hold

    written = plain_yaml.read(run / run_files.CONFIG)
    flat = plain_yaml.flat(written) if isinstance(written, dict) else {}
    now = {key: value for key, value, _ in settings.explain(config)}
    file = run / run_files.CONFIG
    own = settings.load(str(file)) if config.plugins else settings.load_run(file)  # with the keys that plug-ins bring
    then = {key: value for key, value, _ in settings.explain(own)}
    odd = [key for key, value in now.items() if key in then and then[key] != value and key not in ("run.out", *FILES)]
    new = [key for key in now if key.split(".")[0] in written and not _is_said(key, flat)]
    if odd:
        deciding = [key for key in odd if drift.decides(key, then[key], now[key])]
        first = deciding + [key for key in odd if key not in deciding]
        status = FAIL if deciding else WARN
        yield Finding("settings", status, f"other values here: {', '.join(first[:8])}", "leave those words out")
    else:
        are = (
            "key is newer than the run, at its default"
            if len(new) == 1
            else "keys are newer than the run, at their defaults"
        )
        more = f" ({len(new)} {are})" if new else ""
        yield Finding("settings", OK, f"the same{more}; run.seed={config.run.seed}, compat={config.compat}")
    if not config.run.deterministic:
        said = "run.deterministic=false: bit for bit on a CPU, to rounding on a GPU"
        yield Finding("determinism", OK, said)


def _is_said(key: str, flat: dict[str, Any]) -> bool:
    """Whether a file says a key or what it is part of: `data.views: []` says what every view is."""
    words = key.split(".")
    return any(".".join(words[:length]) in flat for length in range(1, len(words) + 1))


def _plugins(run: Path) -> Iterator[Finding]:
    recorded = plain_yaml.read(run / run_files.CONFIG).get("plugins") or []
    if not isinstance(recorded, list) or not recorded:
        return
    missing = [str(entry) for entry in recorded if entry not in plugins.identities()]
    if missing:
        yield Finding(
            "plug-ins", FAIL, f"not here, or changed: {', '.join(missing)}", "--plugin FILE.py of that content"
        )
    else:
        yield Finding("plug-ins", OK, f"the same {len(recorded)}")


def _data(run: Path, config: TrainConfig) -> Iterator[Finding]:
    from amclip_ds import samples

    known = samples.hashes_of(run)
    if "data" not in known:
        yield Finding("data", WARN, "no checkpoint is left that holds the hash of the data", "nothing can be said")
        return
    reading = samples.for_reading(config, run)
    try:
        with samples.opened(reading) as data:
            differing = samples.differing(data, known)
    except (UserError, OSError) as error:
        yield Finding("data", FAIL, in_one_line(error, 300), "data.train=SHARDS of this site")
        return
    if differing:
        key, said, fix = samples.DIFFERENCES[differing[0]]
        yield Finding("data", FAIL, f"{key}: {said}", fix)
    else:
        yield Finding("data", OK, f"the same samples in the same order ({known['data'][:12]})")


def _world(run: Path, config: TrainConfig) -> Iterator[Finding]:
    world = first_world(run)
    if world is None:
        yield Finding("world", WARN, "how many ranks it had is not recorded", "--procs N, as it was started")
    else:
        yield Finding("world", OK, f"{world} ranks, {config.engine.deepspeed}: another number is the same to rounding")


def first_attempt(run: Path) -> int:
    """The attempt that made the run's first steps: a start without a checkpoint (`--resume never`, or an end before the
    first save) throws those of the attempts before it away."""
    if not is_regular(run / run_files.METRICS):
        return 0
    rows = each(run / run_files.METRICS, STEP | {"attempt": int})
    return next((row["attempt"] for row in rows), 0)


def first_world(run: Path) -> int | None:
    """The ranks of the attempt that made the run's first steps."""
    if is_regular(run / run_files.TIMELINE) and (known := world_sizes(run).get(first_attempt(run))):
        return known
    if is_regular(run / run_files.LOG):
        found = WORLD.search(read_bytes(run / run_files.LOG, 1 << 30)[: 1 << 16].decode(errors="replace"))
        if found:
            return int(found[1])
    held = read_json(run / run_files.PLAN, dict) if is_regular(run / run_files.PLAN) else {}
    world = held.get("predicted", {}).get("world_size") if isinstance(held.get("predicted"), dict) else None
    oldest = next(manifest.all_of(run / run_files.CHECKPOINTS), None)
    return world if type(world) is int else (oldest.world_size if oldest else None)


# --- the first steps again -------------------------------------------------------------------------------------------


def first_rows(run: Path, steps: int) -> list[dict[str, Any]]:
    """The recorded rows of the attempt that made them first, up to a step. Raises UserError where there are none."""
    rows: list[dict[str, Any]] = []
    for name in (run_files.METRICS, superseded(run_files.METRICS)):
        if is_regular(run / name):
            rows += read(run / name, STEP, MAX_METRICS)[0]
    attempt = first_attempt(run)
    found = {row["step"]: row for row in rows if row.get("attempt") == attempt and row["step"] <= steps}
    if not found:
        raise UserError(f"{run}: records no step up to {steps} of attempt {attempt}, its first; give a larger --steps")
    return [found[step] for step in sorted(found)]


def repeat(run: Path, overrides: list[str], own: list[str], steps: int, procs: int | None) -> Finding:
    """Trains the first steps again, in a folder that goes, and compares every recorded number of them.

    Raises UserError for a run that recorded none, or whose new start fails.
    """
    recorded = first_rows(run, steps)
    last = recorded[-1]["step"]
    world = procs or first_world(run) or 1
    with tempfile.TemporaryDirectory(prefix="amclip-reproduce-") as folder:
        again = Path(folder, "run")
        words = [
            str(run / run_files.CONFIG),
            *overrides,
            f"run.out={again}",
            "log.every_steps=1",
            "log.tensorboard=false",
            "log.wandb_project=null",
            "checkpoint.every_steps=null",
            "checkpoint.every_minutes=null",
            "eval.data=null",
        ]
        threads = _threads(run)  # sums on a CPU are rounded by how many threads share them
        command = [
            *threads,
            sys.executable,
            "-m",
            "amclip_ds",
            "train",
            *words,
            "--procs",
            str(world),
            *plugin_words(own),
        ]
        rows = _train(command, again, last)
    differing = []
    for row in recorded:
        other = rows.get(row["step"], {})
        names = [name for name in (*COMPARED, *(key for key in row if key.startswith("loss_"))) if name in row]
        differing += [
            f"step {row['step']} {name}: {row[name]!r} then, {other.get(name)!r} now"
            for name in names
            if row[name] != other.get(name)
        ]
    if differing:
        said = f"{len(differing)} numbers differ, the first: {differing[0]}"
        return Finding(
            "steps", FAIL, said, "software, data, ranks, threads (OMP_NUM_THREADS) and kind of processor decide"
        )
    return Finding("steps", OK, f"{len(recorded)} recorded steps up to {last} on {world} ranks, every number the same")


def _threads(run: Path) -> list[str]:
    """The words that give a command the threads a rank that the run had, where it is recorded."""
    reported = read_json(run / run_files.VERSIONS, dict) if is_regular(run / run_files.VERSIONS) else {}
    number = reported.get("threads")
    return ["env", f"OMP_NUM_THREADS={number}"] if type(number) is int and 0 < number < 10_000 else []


def _train(command: list[str], folder: Path, last: int) -> dict[int, dict[str, Any]]:
    """The rows of a run that is stopped once it has recorded a step."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.monotonic() + LIMIT_S
        try:
            rows: dict[int, dict[str, Any]] = {}
            while last not in rows and process.poll() is None and time.monotonic() < deadline:
                time.sleep(POLL_S)
                if is_regular(folder / run_files.METRICS):
                    rows = {row["step"]: row for row in read(folder / run_files.METRICS, STEP, MAX_METRICS)[0]}
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(timeout=120)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        if last not in rows:
            output.seek(0)
            reported = output.read()[-20000:].decode(errors="replace").strip().splitlines() or ["nothing"]
            raise UserError(f"the run could not be started again: it said last: {in_one_line(reported[-1], 300)}")
        return rows


# --- a capsule -------------------------------------------------------------------------------------------------------


def pack(run: Path, own: list[str], capsule: Path) -> int:
    """Writes what another site needs as a .tar.gz. Returns its bytes. Raises UserError."""
    if capsule.exists():
        raise UserError(f"--capsule {capsule}: exists; name a new file")
    parts = {"README.txt": README.encode(), "packages.txt": _packages().encode()}
    reported = read_json(run / run_files.VERSIONS, dict) if is_regular(run / run_files.VERSIONS) else {}
    for name in SMALL:
        if is_regular(run / name) and (name != run_files.CHANGES or _has_patch(run, reported)):
            parts[name] = read_bytes(run / name, 4 * MAX_TEXT)
    oldest = next(manifest.all_of(run / run_files.CHECKPOINTS), None)
    parts[run_files.DATA] = json.dumps({"hashes": oldest.hashes if oldest else {}}, indent=1).encode()
    world = first_world(run)
    if run_files.PLAN not in parts and world is not None:
        parts[run_files.PLAN] = json.dumps({"predicted": {"world_size": world}}).encode()
    parts[run_files.METRICS] = b"".join(encode(row) for row in _first(run, run_files.METRICS))
    if is_regular(run / run_files.TIMELINE):
        starts = read(run / run_files.TIMELINE, run_files.EVENT, MAX_METRICS)[0]
        parts[run_files.TIMELINE] = b"".join(encode(row) for row in starts if row["event"] == "start")
    parts[run_files.SAMPLE_IDS] = b"".join(encode(row) for row in _first(run, run_files.SAMPLE_IDS))
    for file in own:
        if file.endswith(".py"):
            parts[f"plugins/{Path(file).name}"] = read_bytes(Path(file), 4 * MAX_TEXT)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, data in parts.items():
            if data:
                info = tarfile.TarInfo(f"{capsule.name.split('.')[0]}/{name}")
                info.size, info.mtime = len(data), int(time.time())
                tar.addfile(info, io.BytesIO(data))
    try:
        partial = capsule.with_name(f".{capsule.name}.partial")
        with removed_on_error(partial):
            partial.write_bytes(content.getvalue())
            partial.replace(capsule)
    except OSError as error:
        raise not_written(f"--capsule {capsule}:", error) from None
    return len(content.getvalue())


def _first(run: Path, name: str) -> list[dict[str, Any]]:
    if not is_regular(run / name):
        return []
    return [row for row in read(run / name, STEP, MAX_METRICS)[0] if row["step"] <= CAPSULE_STEPS]


def _packages() -> str:
    """Everything that is installed here, as pip's constraints."""
    import importlib.metadata

    found = {
        dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions() if dist.metadata["Name"]
    }
    return "".join(f"{name}=={version}\n" for name, version in sorted(found.items(), key=lambda item: item[0].lower()))
