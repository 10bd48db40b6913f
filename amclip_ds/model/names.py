"""Names that parameters had before, in checkpoints and exports of older versions. Loads no torch.

A parameter that moves keeps its first values, which are keyed by its first name, and its place in old checkpoints.
"""

MOVED = (
    ("heads.o2o.", "objectives.simclr.head."),
    ("heads.o2e_projector.", "objectives.byol.projector."),
    ("heads.o2e_predictor.", "objectives.byol.predictor."),
)  # how a name began -> how it begins now


def first_name(name: str) -> str:
    """What a parameter was called when it first existed."""
    for before, now in MOVED:
        if name.startswith(now):
            return before + name.removeprefix(now)
    return name


def present_buffer(name: str) -> str:
    """The same of a checkpoint's buffer, WHOSE.NAME."""
    whose, dot, rest = name.partition(".")
    return whose + dot + present_name(rest)


def present_name(name: str) -> str:
    """What a parameter of an older version is called now."""
    for before, now in MOVED:
        if name.startswith(before):
            return now + name.removeprefix(before)
    return name
