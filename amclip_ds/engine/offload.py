"""ZeRO-Offload: masters and moments in host memory, stepped there by DeepSpeed's own CPU Adam."""

from typing import Any

import torch

from amclip_ds.errors import UserError
from amclip_ds.optim import OptimConfig


def build_cpu_adam(groups: list[dict[str, Any]], config: OptimConfig, file: str) -> torch.optim.Optimizer:
    """AdamW over host memory. Raises UserError for another optimizer, and where its op cannot be compiled here.

    The first use compiles the op into TORCH_EXTENSIONS_DIR (a minute; a C++ compiler is needed).
    """
    if config.name != "adamw":
        raise UserError(
            f"optim.name: {config.name} cannot step in host memory, where {file} keeps the optimizer; use adamw, or a"
            f" file without _offload"
        )
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        return DeepSpeedCPUAdam(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps,
                                weight_decay=config.weight_decay, adamw_mode=True)  # fmt: skip
    except (RuntimeError, ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"engine.deepspeed: {file} offloads the optimizer, which needs DeepSpeed's cpu_adam op, and that cannot be"
            f" compiled here (a C++ compiler is needed): {reason}; use {file.replace('_offload', '')}"
        ) from error
