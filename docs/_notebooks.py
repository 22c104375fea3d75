"""Shows notebooks as pages of the site: `x.ipynb` becomes the page `x.md`, with a link to the notebook.

The notebooks in the tree have no outputs. The site's are of a run while it is built, which is kept in
build/notebooks for as long as the notebook and the package stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

# What a terminal beside the notebook has done, as the text before its last cell says.
BESIDE = ("data sample messages.csv", "train messages.csv --out runs/messages")


def on_files(files: Any, config: Any) -> Any:
    """Add the page of each notebook."""
    from mkdocs.structure.files import File

    kept = Path(config.config_file_path).parent / "build" / "notebooks"
    for path in sorted(Path(config.docs_dir).glob("*.ipynb")):
        content = f"{markdown(executed(path, kept))}\n\n[The notebook]({path.name})\n"
        files.append(File.generated(config, f"{path.stem}.md", content=content))
    return files


def executed(path: Path, kept: Path) -> dict[str, Any]:
    """The notebook with the outputs of a run.

    Args:
        path: The notebook.
        kept: A folder for runs.
    """
    text = path.read_bytes()
    package = sorted((path.parents[1] / "bayes_kernels").rglob("*.py"))
    made_of = hashlib.sha256(repr(BESIDE).encode() + text)
    for source in package:
        made_of.update(source.read_bytes())
    run = kept / f"{path.stem}-{made_of.hexdigest()[:16]}"
    if not (run / path.name).exists():
        import nbformat
        from nbclient import NotebookClient

        for old in kept.glob(f"{path.stem}-*"):  # of other code, or a run that failed
            shutil.rmtree(old)
        run.mkdir(parents=True)
        for words in BESIDE:
            command = [sys.executable, "-m", "bayes_kernels", *words.split()]
            subprocess.run(command, cwd=run, check=True, stdout=subprocess.DEVNULL)
        notebook = nbformat.reads(text.decode(), as_version=4)
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(run)}}).execute()
        nbformat.write(notebook, run / "unfinished")
        (run / "unfinished").rename(run / path.name)
    found: dict[str, Any] = json.loads((run / path.name).read_text(encoding="utf-8"))
    return found


def markdown(notebook: dict[str, Any]) -> str:
    """The cells of a notebook as Markdown, code in blocks, each with what it shows."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
        elif cell["cell_type"] == "code":
            shown = [shown_output(output) for output in cell["outputs"]]
            parts += [f"```python\n{text}\n```", *filter(None, shown)]
    return "\n\n".join(parts)


def shown_output(output: dict[str, Any]) -> str:
    """An output of a cell as Markdown; nothing for warnings and for widgets, which need a kernel."""
    if output["output_type"] == "stream" and output["name"] == "stdout":
        return f"```text {{.output}}\n{''.join(output['text'])}\n```"
    if output["output_type"] not in ("display_data", "execute_result"):
        return ""
    data = {kind: "".join(value) for kind, value in output["data"].items() if "json" not in kind}
    if len(data) < len(output["data"]):
        return ""
    if "text/html" in data:
        # Markdown ends a block of HTML at an empty line.
        html = re.sub(r"\n\s*(?=\n)", "", data["text/html"]).strip()
        return f'<div class="output">\n{html}\n</div>'
    if "image/png" in data:
        png = "".join(data["image/png"].split())
        return f'<div class="output"><img alt="" src="data:image/png;base64,{png}"></div>'
    return f"```text {{.output}}\n{data.get('text/plain', '')}\n```"
