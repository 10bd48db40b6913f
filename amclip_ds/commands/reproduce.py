"""What repeats a run, held against this machine: versions, revision and changes, settings, plug-ins, data, ranks.

  amclip reproduce runs/aclip-vitb16
  amclip reproduce runs/aclip-vitb16 --steps 20                 trains its first steps again and compares every number
  amclip reproduce runs/aclip-vitb16 --capsule run.tar.gz       packs what another site needs to do the same
  amclip reproduce run data.train='/scratch/cc12m/{00000..01242}.tar' --steps 20      there, of the unpacked capsule

Exit code 0: nothing differs that changes the numbers; 2: something does. Data are read where the run's settings say, or
where data.train says.
"""

import argparse
from pathlib import Path

from amclip_ds import files, json_file
from amclip_ds.arguments import add_plugin, whole

HELP = "what repeats a run, checked against here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run's folder, or an unpacked capsule")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="where things are here (data.train=...)"
    )
    parser.add_argument("--steps", type=whole(1, 10**6), metavar="K", help="train the first K steps again, and compare")
    parser.add_argument("--procs", type=whole(1, 1024), metavar="N", help="with so many ranks (as the run had)")
    parser.add_argument("--capsule", type=Path, metavar="FILE.tar.gz", help="pack what another site needs")
    add_plugin(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the findings as JSON")


def run(args: argparse.Namespace) -> int:
    if args.capsule is not None:
        files.check_output(args.capsule, "--capsule", (b"\x1f\x8b",))
    from amclip_ds import reproduce
    from amclip_ds.doctor import FAIL
    from amclip_ds.errors import DONE, MISTAKE

    config = reproduce.run_settings(args.run_folder, args.overrides, args.plugin)
    found = []
    for finding in reproduce.compare(args.run_folder, config):
        print(finding.line(), flush=True)
        found.append(finding)
    if args.steps is not None:
        again = reproduce.repeat(args.run_folder, args.overrides, args.plugin, args.steps, args.procs)
        print(again.line())
        found.append(again)
    if args.capsule is not None:
        size = reproduce.pack(args.run_folder, args.plugin, args.capsule)
        print(f"{args.capsule}: {size / 1e3:.0f} kB")
    json_file.write(args.json, {"findings": [finding.json() for finding in found]})
    return MISTAKE if any(finding.status == FAIL for finding in found) else DONE
