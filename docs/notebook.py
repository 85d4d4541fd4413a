"""Write docs/tutorial.ipynb, the tutorial as a notebook, from docs/tutorial.md.

python docs/notebook.py
"""

import json
import re
from pathlib import Path

PAGE = Path(__file__).parent / "tutorial.md"


def notebook(page: str) -> str:
    """The page as a notebook: a code cell for each block of Python, the text between them as it is."""
    cells = []
    for i, part in enumerate(re.split(r"^```python\n(.*?)^```\n", page, flags=re.M | re.S)):
        kind = "code" if i % 2 else "markdown"
        if not part.strip():
            continue
        cell = {"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        cells.append(cell | {"source": part.strip("\n").splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.with_suffix(".ipynb").write_text(notebook(PAGE.read_text("utf-8")), encoding="utf-8")
