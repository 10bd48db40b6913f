"""One module a command: HELP, add_arguments(parser), run(args) -> exit code. Thin: parse, call, print."""

import sys

if sys.argv[:1] == ["-m"]:  # as `python -m amclip_ds.commands.NAME` begins, which would end without a word
    from amclip_ds.cli import refuse_to_run

    sys.exit(refuse_to_run(sys.orig_argv[sys.orig_argv.index("-m") + 1]))
