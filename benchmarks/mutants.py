"""Do the tests notice planted faults? Applies each patch of benchmarks/mutants to a copy and runs the tests it names.

    python benchmarks/mutants.py [--only masks] [--tests tests/unit]

The first line of a patch names the tests that must fail under it. A fault that they pass is printed as MISSED, a patch
that no longer applies as STALE; either makes the exit code 1. Where there is no patch the exit code is 2.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
COPIED = ("amclip_ds", "tests", "ds_configs", "slurm", "benchmarks", "pyproject.toml", "Makefile", "README.md")


def outcome(patch: Path, checkout: Path, tests: list[str]) -> str:
    """noticed | MISSED | STALE: what became of one fault in a copy of the checkout."""
    applied = subprocess.run(
        ["patch", "-p1", "--no-backup-if-mismatch", "-i", str(patch)], cwd=checkout, capture_output=True, text=True
    )
    if applied.returncode or "fuzz" in applied.stdout:
        return f"STALE   {' '.join(applied.stdout.split())[-200:]}"
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()[-200:]
    return f"{'noticed' if done.returncode == 1 else 'MISSED '} {last}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression of patches' names")
    parser.add_argument("--tests", nargs="*", help="these tests instead of those that the patches name")
    args = parser.parse_args()
    patches = [patch for patch in sorted(HERE.glob("mutants/*.patch")) if re.search(args.only, patch.stem)]
    if not patches:
        parser.error(f"no patch in {HERE / 'mutants'}" + (f" matches --only {args.only}" if args.only else ""))
    wrong = 0
    for patch in patches:
        named = patch.read_text().splitlines()[0].removeprefix("Noticed by:").split()
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            for name in COPIED:
                source = ROOT / name
                copy = shutil.copytree if source.is_dir() else shutil.copy2
                copy(source, Path(folder, name))
            found = outcome(patch, Path(folder), args.tests or named)
        wrong += not found.startswith("noticed")
        print(f"{patch.stem}: {found}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
