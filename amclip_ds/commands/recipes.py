"""Lists the recipes, or prints one resolved: every key, its value and what it means.

amclip recipes                 the methods by group, what each is; in a pipe the names, METHOD-SIZE, one a line
amclip recipes aclip-vitb16    one: its source, known numbers, what is inferred, and what each key means
amclip recipes aclip-vitb16 optim.lr=1e-3 run.out=runs/mine --yaml > mine.yaml    a file to start from
"""

import argparse

from amclip_ds.arguments import add_plugin

HELP = "list the recipes, or explain one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="NAME", help="a recipe, or the path of a yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="laid over the recipe")
    parser.add_argument("--yaml", action="store_true", help="print the resolved settings as yaml")
    add_plugin(parser)


def run(args: argparse.Namespace) -> int:
    from amclip_ds import config, display

    if args.recipe is None:
        if display.console().is_terminal:
            print_methods()
        else:
            print("\n".join(config.recipe_names()))
        return 0
    resolved = config.load(args.recipe, args.overrides, args.plugin)
    if args.yaml:
        print(config.dump(resolved), end="")
        return 0
    explained = config.explain(resolved)
    cells = [(key, "null" if value is None else value, meaning) for key, value, meaning in explained]
    for line in lines_of_header(args.recipe):
        print(line)
    display.print_table(("key", "value", "meaning"), cells, title=args.recipe)
    return 0


def print_methods() -> None:
    from amclip_ds import config, display
    from amclip_ds.recipe_headers import all_headers

    last, rows = "", []
    for header in all_headers():
        rows.append((header.group if header.group != last else "", header.method, header.title))
        last = header.group
    display.print_table(("group", "METHOD", "what it is"), rows)
    print(f"A recipe is METHOD-SIZE; SIZE is {', '.join(config.size_names())}.")
    print("`amclip recipes METHOD-SIZE` says where it is from, which numbers are known and what is inferred.")


def lines_of_header(recipe: str) -> list[str]:
    """What a shipped recipe says of itself; nothing for a yaml of one's own."""
    from amclip_ds import config
    from amclip_ds.recipe_headers import read_header

    method = config.method_of_recipe(recipe)
    if method is None:
        return []
    header = read_header(method)
    said = [f"{part}: {text}" for part, text in header.parts.items()]
    return [header.title, *said] if header.title else said
