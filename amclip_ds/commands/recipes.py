"""Lists the recipes, or prints one resolved: every key, its value and what it means.

amclip recipes                 the names
amclip recipes aclip-vitb16    one, with what each key means
amclip recipes aclip-vitb16 optim.lr=1e-3 --yaml > mine.yaml    a file to start from
"""

import argparse

from amclip_ds.arguments import add_plugin

HELP = "list the recipes, or explain one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="NAME", help="a recipe, or the path of a yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="laid over the recipe")
    parser.add_argument("--yaml", action="store_true", help="print the resolved settings as yaml")
    add_plugin(parser)


def run(args: argparse.Namespace) -> int:
    from amclip_ds import config, display

    if args.recipe is None:
        print("\n".join(config.recipe_names()))
        return 0
    resolved = config.load(args.recipe, args.overrides, args.plugin)
    if args.yaml:
        print(config.dump(resolved), end="")
        return 0
    explained = config.explain(resolved)
    cells = [(key, "null" if value is None else value, meaning) for key, value, meaning in explained]
    display.print_table(("key", "value", "meaning"), cells, title=args.recipe)
    return 0
