"""Compiles DeepSpeed's CPU communication op ahead: `python -m amclip_ds.engine.build_ops`, part of `make setup`."""

import sys
import time

from amclip_ds.engine.runtime import prepare_extensions


def main() -> int:
    """Builds, or finds built, the op in TORCH_EXTENSIONS_DIR. Returns 0; a compiler's failure is raised as it is."""
    folder = prepare_extensions(announce=False)
    lock = folder / "deepspeed_shm_comm" / "lock"
    if lock.exists():
        print(f"{lock} exists: waiting for the build that holds it (remove it if that build was killed)", flush=True)
    from deepspeed.accelerator import get_accelerator

    start = time.monotonic()
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None:
        print(f"the {get_accelerator().device_name()} accelerator needs no communication op")
        return 0
    builder.load(verbose=False)
    print(f"communication op ready in {folder} ({time.monotonic() - start:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
