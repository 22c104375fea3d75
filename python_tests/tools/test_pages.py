"""Code blocks of README.md and docs/ run as they stand; links, paths and names in pages exist.

Blocks run in a folder that has what they load: `my-model` and `my-lora` (a classifier, a plain adapter),
`my_data/` and `reviews.jsonl`. A page's Python blocks share their names, as a reader would type them one after
the other; a comment `# prints X` is compared with what the block prints.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import tiny_task  # noqa: E402

# Models stay on the CPU, and a page's figures do not depend on the machine.
pytestmark = pytest.mark.cpu_only

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    """Line and text of a page's blocks."""
    found = [one for one in BLOCK.finditer(TEXTS[page]) if one[1] == language]
    return [(TEXTS[page].count("\n", 0, one.start(2)), one[2]) for one in found]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages take to be there."""
    home = tmp_path_factory.mktemp("home")
    tiny_task.write_data(home / "my_data")
    tiny_task.write_rows(home / "reviews.jsonl", tiny_task.rows(80, "review", 3))
    tiny_task.write_model(home / "my-model")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(home / "my-model")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(base, config)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(home / "my-lora")
    (home / "cuda_benchmarks").symlink_to(ROOT / "cuda_benchmarks")
    return home


@pytest.fixture
def folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    copy = shutil.copytree(home, tmp_path / "home", symlinks=True)
    monkeypatch.chdir(copy)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield copy


@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(page, "python")])
def test_python_blocks_run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend("cuda_benchmarks")
    names: dict[str, object] = {"__name__": "__main__"}
    for line, code in blocks(page, "python"):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile("\n" * line + code, page, "exec"), names)
        for promise in re.findall(r"# prints (.*)", code):
            assert promise in said.getvalue()
