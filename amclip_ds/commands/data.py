"""Makes shards, synthetic ones or of what you have; indexes, checks and pictures them.

  amclip data synth --out scenes            a small data set to try everything on
  amclip data pack pairs.csv --out /data/pairs    shards of a folder, a table, a Hugging Face data set
  amclip data index '/data/{00000..00999}.tar'    where each sample is; training reads it
  amclip data check /data/cc12m             before sbatch: what training would trip over; the exit code says go or no
  amclip data stats /data/cc12m --out stats  distributions: sizes, aspects, captions, tokens

SHARDS is a folder, a glob, braces, a list (a text file, one shard a line), or several of them joined by `::`; local
paths or URLs (http, https, s3, gs).
`amclip data ACTION --help` teaches each action.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amclip_ds import json_file
from amclip_ds.arguments import number, whole
from amclip_ds.errors import UserError
from amclip_ds.files import not_written

if TYPE_CHECKING:
    from amclip_ds.data.check import CheckReport

LONGEST_KEY = 400  # of a stranger's name, in characters, on the terminal
HELP = "make shards of what you have, or synthetic ones; index, check and picture them"
PACK = """Makes tars to train on of images with captions.

  amclip data pack photos --out /data/photos                 a folder: NAME.txt beside NAME.jpg, or metadata.csv
  amclip data pack pairs.csv --out /data/pairs               a csv, tsv or jsonl of names and captions
  amclip data pack cc3m.tsv --image-key filepath --caption-key title --root /data/cc3m/images --out /data/cc3m
  amclip data pack /data/pokemon --split train --out /data/p  Parquet or Arrow with the images inside (Hugging Face)

Every image is decoded; what training would trip over is left out, counted and named in DIR/pack.jsonl. Started again
with the same arguments, a pack that was stopped resumes from its last whole tar. A sample's key is its row's number;
rows of a table that follow each other and name one image are one sample, with a caption a row.
Rows keep their order: shuffle a table that is sorted by class, since training shuffles within windows of shards.
"""
SYNTH = """Makes cluttered scenes with one captioned object each: 8 shapes x 8 colours, so chance is 1/64.

  amclip data synth --out scenes
  amclip train aclip-tiny data.train=scenes/train eval.data=scenes

The same arguments give the same bytes on every machine. DIR holds train/*.tar and, in CLIP_benchmark's layout, test/
with classnames.txt and templates; each sample is key.jpg, key.txt, key.cls and key.json with the object's box.
"""
INDEX = """Reads every tar once and writes where each sample is and what it holds (46 bytes each, beside its key).

  amclip data index '/data/cc12m/{00000..01242}.tar' --out /data/cc12m-index
  amclip train aclip-vitb16 data.train=/data/cc12m data.index=/data/cc12m-index

Without --out the index is beside the shards, where training finds it by itself. Training compares each member that it
reads with the checksum noted here: a shard that changed is named, and refused (data.on_change); a touch is nothing.
"""
CHECK = """Reads every sample as training would and accounts for each: expected = read + skipped + lost.

  amclip data check /data/cc12m                            everything, one process per core
  amclip data check /data/cc12m --sample 0.05              all headers, the contents of every twentieth sample
  amclip data check /data/cc12m --json check.json          for scripts

lost      damage has swallowed it: unreadable, empty or truncated tars, broken headers, fewer than sizes.json or
          img2dataset's stats promise
skipped   training would leave it out: no image, broken image, too large, no or empty caption, not UTF-8, members that
          are not adjacent, sparse files, surplus images (of a key that has one already: no image is in no account)
noted     duplicates (by hash), damaged but decoded, too small, extreme aspects, hostile names, links: no hindrance

Exit code 0: submit. 2: do not: something is lost, or more than --max-skip-rate is skipped or doubled.
"""
STATS = """Prints and pictures the distributions of sizes, aspects, bytes, captions and tokens; decodes nothing.

  amclip data stats /data/cc12m --out stats --json stats.json
  amclip data stats /data/cc12m --words words.json       for data.text_mask.table, strategy frequency
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    synth = _add(actions, "synth", "make shards of synthetic scenes", SYNTH, _synth)
    synth.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    synth.add_argument("--train", type=whole(1), default=20000, metavar="N", help="training scenes (default 20000)")
    synth.add_argument("--test", type=whole(1), default=2048, metavar="N", help="held-out scenes (default 2048)")
    synth.add_argument(
        "--image-size", type=whole(16, 4096), default=64, metavar="PX", help="side in pixels (default 64)"
    )
    synth.add_argument("--seed", type=whole(0), default=0, help="another seed, other scenes (default 0)")
    synth.add_argument("--shard-size", type=whole(1), default=1000, metavar="N", help="scenes a tar (default 1000)")
    synth.add_argument("--coloured-distractors", action="store_true", help="colour the clutter too (a control)")
    synth.add_argument("--small-objects", action="store_true", help="objects of half the side")
    synth.add_argument("--workers", type=whole(1, 1024), metavar="N", help="processes (default: one per core)")

    pack = _add(actions, "pack", "make shards of a folder, a table, a Hugging Face data set", PACK, _pack)
    pack.add_argument("source", metavar="SOURCE", help="a folder, a .csv, .tsv, .jsonl, .parquet or .arrow file")
    pack.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, or one to continue with")
    pack.add_argument(
        "--image-key", metavar="COLUMN", help="of the images' names or bytes (default: filepath, image, ...)"
    )
    pack.add_argument("--caption-key", metavar="COLUMN", help="of the captions (default: title, caption, text, ...)")
    pack.add_argument("--root", type=Path, metavar="DIR", help="names are relative to it (default: the table's folder)")
    pack.add_argument("--split", default="", metavar="NAME", help="of a data set that has several")
    pack.add_argument("--shard-size", type=whole(1), default=10000, metavar="N", help="samples a tar (default 10000)")
    pack.add_argument("--workers", type=whole(1, 1024), metavar="N", help="threads (default: one per core)")
    pack.add_argument("--json", type=Path, metavar="FILE", help="write the counts there")

    index = _add(actions, "index", "write where each sample of the shards is", INDEX, _index)
    _add_shards(index)
    index.add_argument("--out", type=Path, metavar="DIR", help="the index's folder (default: beside the shards)")

    check = _add(actions, "check", "find what training would trip over", CHECK, _check)
    _add_shards(check)
    _add_captions(check)
    check.add_argument(
        "--sample", type=number(0, 1), default=1.0, metavar="F", help="part of the samples to read (default 1)"
    )
    check.add_argument(
        "--max-skip-rate", type=number(0, 1), metavar="F", help="to be skipped or doubled (default 0.02)"
    )
    check.add_argument("--global-batch", type=whole(1), default=4096, metavar="N", help="to count an epoch's steps")
    check.add_argument("--json", type=Path, metavar="FILE", help="write the report there")

    stats = _add(actions, "stats", "distributions of sizes and captions, with pictures", STATS, _stats)
    _add_shards(stats)
    _add_captions(stats)
    stats.add_argument(
        "--sample", type=number(0, 1), default=1.0, metavar="F", help="part of the samples to read (default 1)"
    )
    stats.add_argument("--out", type=Path, metavar="DIR", help="draw the pictures there")
    stats.add_argument("--words", type=Path, metavar="FILE", help="count the captions' words and write the table there")
    stats.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")


def run(args: argparse.Namespace) -> int:
    if "shards" in args:
        from amclip_ds.shards.sources import expand_shards

        args.shards = [shard for spec in args.shards for shard in expand_shards(spec, "SHARDS", args.allow_pipe)]
    return args.act(args)


def _add(
    actions: Any, word: str, short: str, text: str, act: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser = actions.add_parser(word, help=short, description=text)
    parser.set_defaults(act=act)
    return parser


def _add_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="a folder, a glob, braces, a list.txt, URLs")
    parser.add_argument("--workers", type=whole(1, 1024), metavar="N", help="processes (default: one per core)")
    parser.add_argument("--allow-pipe", action="store_true", help="let SHARDS run shell commands (pipe:...)")


def _add_captions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--captions", metavar="SOURCES", help="as in data.captions: [A,B], or A,B")


def _synth(args: argparse.Namespace) -> int:
    from amclip_ds.data import synthetic

    made = synthetic.write_dataset(
        args.out,
        args.train,
        args.test,
        args.image_size,
        args.seed,
        shard_size=args.shard_size,
        coloured_distractors=args.coloured_distractors,
        small_objects=args.small_objects,
        workers=args.workers,
    )
    done = "made" if made else "already exist"
    print(f"{args.train} training and {args.test} held-out scenes {done}")
    print(args.out)
    return 0


def _pack(args: argparse.Namespace) -> int:
    from amclip_ds.data import pack, pack_sources
    from amclip_ds.progress import progress

    keys = pack_sources.Keys(args.image_key, args.caption_key, args.root, args.split)
    source = pack_sources.open_source(args.source, keys)
    print(source.describe(), flush=True)
    with progress("packing rows", source.count) as advance:
        found = pack.pack(source, args.out, args.shard_size, _workers(args), advance)
    for line in found.lines():
        print(line)
    json_file.write(args.json, found.facts())
    print(args.out)
    return 0


def _index(args: argparse.Namespace) -> int:
    from amclip_ds.progress import progress
    from amclip_ds.shards import index
    from amclip_ds.shards.tar import printable

    folder = args.out or index.default_folder(tuple(args.shards))
    with progress("indexing shards", len(args.shards)) as advance:
        made = index.build_index(args.shards, folder, _workers(args), lambda entry: advance(), "--out")
    problems = [(shard.path, problem) for shard in made.shards for problem in shard.problems]
    for path, problem in problems[:20]:
        print(f"  {path}: {problem['kind']} ({problem['count']}): {printable(problem['key'])}")
    if len(problems) > 20:
        print(f"  and {len(problems) - 20} more; amclip data check SHARDS lists them all")
    print(f"{len(made)} samples in {len(args.shards)} shards, fingerprint {made.fingerprint()}")
    print(folder)
    return 0


def _check(args: argparse.Namespace) -> int:
    from amclip_ds.data import stats
    from amclip_ds.data.check import CheckConfig

    report = _run_check(args, "checking", CheckConfig(**_settings(args, max_skip_rate=args.max_skip_rate)))
    tokens, epoch = stats.summarise_tokens(report), _epoch(report, args.global_batch, _workers(args))
    found = report.as_json() | {"epoch": epoch, "tokens": tokens}
    _print_problems(report)
    _print_tokens(tokens)
    _print_epoch(epoch)
    json_file.write(args.json, found)
    print(f"{report.verdict()}: {'submit' if report.ok else 'do not submit'}")
    return 0 if report.ok else 2


def _stats(args: argparse.Namespace) -> int:
    json_file.check(args.words, "--words")
    if args.out:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise not_written(f"--out {args.out}:", error) from None
    from amclip_ds import display
    from amclip_ds.data import stats
    from amclip_ds.data.check import CheckConfig

    report = _run_check(
        args, "counting", CheckConfig(**_settings(args, decode=False, count_words=args.words is not None))
    )
    numbers = stats.summarise(report)
    shown = [place for place, part in enumerate(stats.PERCENTILES) if part in (1, 25, 50, 75, 99)]
    columns = [f"{stats.PERCENTILES[place]}%" for place in shown]
    cells = [
        (name, *(f"{row['percentiles'][place]:.4g}" for place in shown), f"{row['mean']:.4g}")
        for name, row in numbers["distributions"].items()
    ]
    display.print_table(("", *columns, "mean"), cells, title=f"{numbers['samples']} samples: percentiles")
    print("formats: " + ", ".join(f"{name} {count}" for name, count in numbers["formats"].items()))
    print(f"captions over {stats.CONTEXT_LENGTH} tokens, trimmed in training: {numbers['trimmed_captions']:.1%}")
    if report.total("skipped") or report.total("lost"):
        kinds = ", ".join(f"{kind} {count}" for kind, count in report.problems().most_common())
        print(f"not in these numbers: {report.verdict()} ({kinds}); `amclip data check` names the first of each kind")
    json_file.write(args.json, numbers)
    if args.words:
        table = stats.word_table(report)
        if not table["counts"]:
            raise UserError(f"--words {args.words}: no caption was read, so there is no word to count")
        json_file.write(args.words, table, "--words")
        print(f"{len(table['counts'])} words -> {args.words}")
    if args.out:
        print(stats.draw(report, args.out / "stats.png"))
    return 0


def _run_check(args: argparse.Namespace, word: str, config: Any) -> "CheckReport":
    from amclip_ds.data.check import check
    from amclip_ds.progress import progress

    with progress(f"{word} shards", len(args.shards)) as advance:
        return check(args.shards, config, _workers(args), lambda report: advance())


def _settings(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    captions = None if args.captions is None else _captions(args.captions)
    return {k: v for k, v in {"sample": args.sample, "captions": captions, **more}.items() if v is not None}


def _captions(text: str) -> tuple[str, ...]:
    """The sources, as data.captions takes them or by commas; one before a space is a template's own: `{a}, {b}`.
    Raises UserError."""
    from amclip_ds import plain_yaml

    items = plain_yaml.parse(text, "--captions") if text.startswith("[") else re.split(r",(?! )", text)
    if not all(isinstance(item, str) for item in items):
        raise UserError(f"--captions: {text!r} is no list of texts")
    return tuple(items)


def _workers(args: argparse.Namespace) -> int:
    from amclip_ds.processes import num_cores

    return args.workers or num_cores()


def _epoch(report: "CheckReport", global_batch: int, workers: int) -> dict[str, Any]:
    """How long an epoch is, and how long `workers` processes take to read and decode it."""
    samples, rate = report.samples_in_an_epoch(), report.samples_per_core_second()
    return {
        "samples": samples,
        "global_batch": global_batch,
        "steps": samples // global_batch,
        "gigabytes": report.total("num_bytes") / 1e9,
        "samples_per_core_second": rate,
        "workers": workers,
        "reading_hours": samples / rate / workers / 3600 if rate else None,
    }


def _print_problems(report: "CheckReport") -> None:
    """A line a shard and a line a problem in it, then the sums by problem; plain lines, so that a pipe or a narrow
    terminal cuts no name."""
    from amclip_ds.redact import redact
    from amclip_ds.shards.grouping import ADVICE
    from amclip_ds.shards.tar import printable

    for shard in report.shards:
        if shard.problems:
            ok = "ok" if shard.is_ok(report.config.max_skip_rate) else "NOT ok"
            print(
                f"{printable(redact(shard.path))}: {ok}, read {shard.read}, skipped {shard.skipped}, lost {shard.lost}"
            )
        for kind, (key, count) in shard.problems.items():
            print(f"  {kind}: {count}, {printable(key)[:LONGEST_KEY]}")
    for kind, count, key, path in report.worst():
        advice = f"; {ADVICE[kind]}" if kind in ADVICE else ""
        print(f"{kind}: {count} in all, the first {printable(key)[:LONGEST_KEY]} in {printable(redact(path))}{advice}")
    for cause, count in report.causes().most_common(10):
        print(f"  {count} {'sample' if count == 1 else 'samples'}: {cause}")
    print(report.account())


def _print_tokens(tokens: dict[str, Any]) -> None:
    half, most = tokens["percentiles"]["50"], tokens["percentiles"]["95"]
    print(
        f"captions: half have at most {half:.0f} tokens, 95% at most {most:.0f};"
        f" {tokens['trimmed']:.1%} are longer than {tokens['context_length']} and are cut in training"
    )


def _print_epoch(epoch: dict[str, Any]) -> None:
    from amclip_ds import display

    hours = epoch["reading_hours"]
    took = "an unknown time" if hours is None else display.duration(3600 * hours)
    steps = f"{epoch['steps']} steps of" if epoch["steps"] else "less than one batch of"
    print(
        f"one epoch: {epoch['samples']} samples, {epoch['gigabytes']:.3g} GB, {steps}"
        f" {epoch['global_batch']}; {took} to read and decode on {epoch['workers']} cores"
        f" ({epoch['samples_per_core_second']:.0f} samples/s a core)"
    )
