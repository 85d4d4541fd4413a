"""Run the code of docs/tutorial.md, and draw its pictures from what it has trained.

    python examples/experiments/tutorial.py --plot docs/tutorial

The build of the documentation does the same.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import plots

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"


def run(page: Path = PAGE) -> dict[str, Any]:
    """Execute the page's Python from top to bottom; the names that it leaves."""
    names: dict[str, Any] = {}
    for block in re.findall(
        r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S
    ):
        exec(block, names)
    return names


def draw(names: dict[str, Any], folder: Path) -> None:
    """Ten test digits: attacked, with both networks' predictions, and both networks' input gradients."""
    x, y = (part[:10] for part in next(iter(names["test_loader"])))
    models = {"natural": names["natural"].eval(), "Free": names["robust"].eval()}
    figure = plots.plt.figure(figsize=(9, 5.4))
    plots.predictions(figure, models, x, y, "0123456789", names["threat"], steps=40)
    plots.save(figure, folder / "perturbations.png")
    figure = plots.plt.figure(figsize=(9, 3.1))
    plots.input_gradients(figure, models, x, y, "0123456789")
    plots.save(figure, folder / "gradients.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--plot", type=Path, default=Path("tutorial"), help="folder of the pictures"
    )
    args = parser.parse_args()
    draw(run(), args.plot)
    print(f"written: {args.plot}/perturbations.png, gradients.png")


if __name__ == "__main__":
    main()
