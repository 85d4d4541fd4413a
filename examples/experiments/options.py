"""The command lines of the experiments: values that are checked where they are read, and help that shows defaults."""

import argparse
import importlib.util
from collections.abc import Callable
from fractions import Fraction


def fraction(text: str) -> float:
    """A number, or one over another: `0.15`, `8/255`."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"a number such as 0.03 or 8/255, got {text}") from None


def radius(text: str) -> float:
    """A fraction that is a distance between images in [0, 1]."""
    value = fraction(text)
    if not 0 < value <= 1:
        hint = f"; did you mean {text}/255?" if 1 < value <= 255 else ""
        raise argparse.ArgumentTypeError(
            f"above 0 and at most 1, for pixels in [0, 1], got {text}{hint}"
        )
    return value


def at_least(least: int) -> Callable[[str], int]:
    """The type of a whole number that is not less than this."""

    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return whole


class Help(argparse.HelpFormatter):
    """Each default as one would type it, but for switches and for what has none.

    A default that is given as text, such as "8/255", is shown as that text and read as if it had been typed.
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        default, text = action.default, action.help or ""
        if default is None or default is False or default is argparse.SUPPRESS or action.required:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} (default: {shown})".replace("%", "%%").strip()


def demand_autoattack(argument: str, classes: int) -> None:
    """AutoAttack comes last: what it lacks is said before the training.

    Raises:
        SystemExit: It cannot run.
    """
    if importlib.util.find_spec("pyautoattack") is None:
        raise SystemExit(
            f"{argument} needs pyautoattack: pip install -e '.[eval]' in the clone, or leave it out"
        )
    if classes < 4:
        raise SystemExit(
            f"{argument} needs at least 4 classes, here are {classes}: leave it out, PGD does with two"
        )
