"""The arguments that mean the same in all these scripts."""

import argparse
from fractions import Fraction


def fraction(text: str) -> float:
    """A number, or one over another: `0.15`, `8/255`."""
    return float(Fraction(text))


def parser(
    doc: str,
    *,
    passes: int,
    eps: float,
    lr: float,
    replays: int | None = None,
    batch_size: int = 64,
) -> argparse.ArgumentParser:
    """A parser with these defaults; a script adds what only it has."""
    made = argparse.ArgumentParser(description=doc.split("\n")[0])
    add = made.add_argument
    add("--passes", type=int, default=passes, help="natural passes over the data: the cost")
    if replays is not None:
        add("--replays", type=int, default=replays, help="the paper's m")
    add("--eps", type=fraction, default=eps, help="radius, in the units of the input")
    add("--batch-size", type=int, default=batch_size, help="of an update, all ranks together")
    add("--lr", type=float, default=lr, help="peak of the schedule")
    add("--seed", type=int, default=0)
    add("--dry-run", action="store_true", help="a few updates, to see that it runs")
    return made
