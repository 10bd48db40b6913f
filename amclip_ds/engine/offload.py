"""ZeRO-Offload: masters and moments in host memory, stepped there by DeepSpeed's own CPU Adam, compiled at first use.

The compiler works in a folder of its own, with a time limit, and the op is put in place by one rename: neither a killed
build nor another one's lock can hold a run up.
"""

import hashlib
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from amclip_ds.errors import AmclipError, UserError, in_one_line
from amclip_ds.optim import OptimConfig
from amclip_ds.ranks.collectives import on_all
from amclip_ds.ranks.runtime import Runtime, build_environment, extensions_dir

OP = "cpu_adam"
BUILD_LIMIT_S = 300.0  # it takes about half a minute; below the 600 s that the other ranks wait in a collective
BUILD = "from deepspeed.ops.op_builder import CPUAdamBuilder; print(CPUAdamBuilder().load(verbose=True).__file__)"


def build_cpu_adam(
    groups: list[dict[str, Any]], config: OptimConfig, file: str, runtime: Runtime
) -> torch.optim.Optimizer:
    """AdamW over host memory. Raises UserError where its op cannot be compiled here.

    The first use compiles the op into TORCH_EXTENSIONS_DIR (a C++ compiler is needed), by one rank a node. Collective:
    every rank must call.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        on_all(partial(_compile, runtime.is_main) if runtime.local_rank == 0 else lambda: None)
        on_all(_load)
        return DeepSpeedCPUAdam(
            groups,
            lr=config.lr,
            betas=(config.betas[0], config.betas[1]),
            eps=config.eps,
            weight_decay=config.weight_decay,
            adamw_mode=True,
        )
    except (AmclipError, RuntimeError, ImportError, OSError) as error:
        reason = in_one_line(error, 300)
        raise UserError(
            f"engine.deepspeed: {file} offloads the optimizer, which needs DeepSpeed's cpu_adam op, and that cannot be"
            f" compiled here (a C++ compiler is needed): {reason}; use {file.replace('_offload', '')}"
        ) from error


def _place() -> Path:
    """Where the op is, or will be: another torch, DeepSpeed, Python or kind of processor has another one."""
    import deepspeed

    facts = [torch.__version__, deepspeed.__version__, platform.python_version(), *_processor()]
    return extensions_dir() / f"{OP}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}.so"


def _processor() -> list[str]:
    """What the compiler's -march=native goes by."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    return [platform.machine(), *sorted({line for line in lines if line.startswith(("flags", "Features"))})]


def _compile(announce: bool) -> None:
    """Makes the op where there is none. Raises AmclipError, OSError."""
    from deepspeed.git_version_info import installed_ops

    place = _place()
    if installed_ops.get(OP) or place.exists():
        return
    if announce:
        print(f"compiling DeepSpeed's {OP} op into {place} (once; at most {BUILD_LIMIT_S:.0f} s)", flush=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=place.parent) as folder:
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", BUILD],
                env=build_environment(folder),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(BUILD_LIMIT_S)
            except subprocess.TimeoutExpired:
                raise AmclipError(f"the compiler was not done after {BUILD_LIMIT_S:.0f} s") from None
            finally:
                _end(process)
        reported = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        if status != 0:
            raise AmclipError(f"the build ended with {status}: {reported[-1]}")
        os.replace(reported[-1], place)


def _end(process: subprocess.Popen) -> None:
    """The build with all compilers that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _load() -> None:
    """Hands the op to DeepSpeed's own loader, which then takes no lock. Raises OSError, ImportError."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import CPUAdamBuilder

    if installed_ops.get(OP) or OP in CPUAdamBuilder._loaded_ops:
        return
    spec = importlib.util.spec_from_file_location(OP, _place())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    CPUAdamBuilder._loaded_ops[OP] = module
