"""Write docs/tutorial.ipynb, the tutorial as a notebook, from docs/tutorial.md.

python docs/notebook.py
"""

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "tutorial.md"


CODE = r"^```python\n(.*?)^```\n(?:\n^```text\n(.*?)^```\n)?"  # and what it has printed


def notebook(page: str) -> str:
    """The page as a notebook: a code cell for each block of Python, with what it prints; the text as it is."""
    cells: list[dict[str, Any]] = []
    text, *blocks = re.split(CODE, page, flags=re.M | re.S)

    def add(kind: str, source: str, **others: Any) -> None:
        if source.strip():
            lines = source.strip("\n").splitlines(keepends=True)
            cell = {"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, **others}
            cells.append(cell | {"source": lines})

    add("markdown", text)
    for i, (code, printed, text) in enumerate(zip(*[iter(blocks)] * 3, strict=True)):
        shown = [] if printed is None else printed.splitlines(keepends=True)
        output = {"name": "stdout", "output_type": "stream", "text": shown}
        add("code", code, execution_count=i + 1, outputs=[output] if shown else [])
        add("markdown", text)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.with_suffix(".ipynb").write_text(notebook(PAGE.read_text("utf-8")), encoding="utf-8")
