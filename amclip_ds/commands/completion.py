"""Prints what makes a shell complete commands, options, recipes, keys and their values at TAB.

amclip completion bash > ~/.local/share/bash-completion/completions/amclip      for every new shell
source <(amclip completion bash)                                                for this one
amclip completion zsh > ~/.zfunc/_amclip                    with `fpath+=~/.zfunc` before compinit in ~/.zshrc
"""

import argparse

from amclip_ds.completion import SHELLS, script

HELP = "print the completion of a shell"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell that will source it")


def run(args: argparse.Namespace) -> int:
    print(script(args.shell))
    return 0
