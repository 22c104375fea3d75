"""Shows notebooks as pages of the site: `x.ipynb` becomes the page `x.md`, with a link to the notebook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def on_files(files: Any, config: Any) -> Any:
    """Add the page of each notebook."""
    from mkdocs.structure.files import File

    for path in sorted(Path(config.docs_dir).glob("*.ipynb")):
        page = File.generated(config, f"{path.stem}.md", content=markdown(path))
        files.append(page)
    return files


def markdown(path: Path) -> str:
    """The cells of a notebook as Markdown, code in blocks."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join([*parts, f"[The notebook]({path.name})"]) + "\n"
