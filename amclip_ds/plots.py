"""matplotlib without a screen: every plot of ours is drawn through it."""

from typing import Any


def pyplot() -> Any:
    """matplotlib.pyplot, loaded when the first plot is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
