"""Writes a run, or several, as one HTML file: its state and why, curves, time line, data, masks, classes, settings.

  amclip report runs/aclip-vitb16                        -> runs/aclip-vitb16/report.html
  amclip report runs/clip runs/aclip --out both.html     compared: curves over each other, what differs

The file needs nothing else: open it from disk, send it, print it. Any moment of a run will do; a run writes its own at
its end. Nothing but the run's folder is read.
"""

import argparse
from pathlib import Path

HELP = "write a run as one HTML file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder; several are compared")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the file to write (RUN/report.html; of several runs, report.html here)",
    )


def run(args: argparse.Namespace) -> int:
    from amclip_ds import files, run_files
    from amclip_ds.report.page import write_report

    out = args.out or (args.runs[0] / run_files.REPORT if len(args.runs) == 1 else Path(run_files.REPORT))
    if args.out is not None:
        files.check_output(out, "--out", (b"<",))
    size = write_report(args.runs, out)
    print(f"{out}: {size / 1e6:.2f} MB")
    return 0
