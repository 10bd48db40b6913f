"""Checks this machine, and a run that does not learn: each finding is ok, warn or fail, with its fix.

  amclip doctor                        software, GPUs, compiler, disk, /dev/shm, limits, clock, launcher, collective
  amclip doctor runs/aclip-vitb16      the same, and why the run does not learn: loss, learning rate, logit scale,
                                       duplicates, collapsed features, evaluations at chance
  amclip doctor --out /lustre/me/runs --json doctor.json

Exit code 0: nothing fails; 2: something does.
"""

import argparse
from pathlib import Path

from amclip_ds import json_file

HELP = "what this machine has and would fail at; why a run does not learn"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", nargs="?", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where runs are to be (here)")
    parser.add_argument("--json", metavar="FILE", help="also write the findings as JSON")


def run(args: argparse.Namespace) -> int:
    from amclip_ds.doctor import FAIL, findings, machine
    from amclip_ds.errors import DONE, MISTAKE

    checks = machine.checks(args.run_folder or args.out)
    if args.run_folder is not None:
        from amclip_ds.doctor import learning

        checks |= learning.checks(args.run_folder)
    found = []
    for finding in findings(checks):
        print(finding.line(), flush=True)
        found.append(finding)
    json_file.write(args.json, {"findings": [finding.json() for finding in found]})
    return MISTAKE if any(finding.status == FAIL for finding in found) else DONE
