"""What `python -m bayes_kernels` and `bayes-kernels info` say of versions, devices and the library."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys

import pytest
from programs import python, run_command

import bayes_kernels as bk
from bayes_kernels import _library, diagnosis
from bayes_kernels.library_file import EMULATOR, LIBRARY, find_library

LAST = (
    "`bayes-kernels info --devices` loads torch and the ops, and says which path each device takes"
)


def test_broken_library_is_reported(tmp_path):
    (tmp_path / "libbayes_kernels.so").write_bytes(b"not a library")
    result = python(
        "from bayes_kernels.diagnosis import paths; print(paths())",
        BAYES_KERNELS_LIBRARY=str(tmp_path),
    )
    assert "NOT LOADED" in result.stdout and "could not be loaded" in result.stdout
    assert "  cpu: plain PyTorch, slower: the compiled ops are not available" in result.stdout


def test_diagnosis_names_versions_and_paths():
    ended = run_command([sys.executable, "-m", "bayes_kernels"])
    assert ended.returncode == 0, ended.stderr
    assert f"bayes_kernels {bk.__version__}" in ended.stdout
    assert "torch " in ended.stdout and "  cpu: fused " in ended.stdout
    assert "  cuda" in ended.stdout


def test_versions_are_shown_before_torch_is_imported():
    """Also where it cannot be: then one line says so."""
    program = (
        "import sys; from bayes_kernels import diagnosis\n"
        "diagnosis.paths = lambda: str({'torch', 'numpy', 'typer'} & {*sys.modules})\n"
        "diagnosis.print_diagnosis()"
    )
    first, second, last = python(program).stdout.splitlines()
    assert first.startswith("bayes_kernels ") and second.startswith("packages: torch 2.")
    assert last == "set()"
    for words in ("", ", 'info', '--devices'"):
        program = (
            f"import sys; sys.modules['torch'] = None; sys.argv[:] = ['bayes-kernels'{words}]\n"
            "from bayes_kernels.__main__ import main; main()"
        )
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert ended.returncode != 0 and ended.stdout.splitlines() == [first, second]
        assert ended.stderr.startswith(
            "error: torch: expected a release that can be imported, got: "
        )
        assert ended.stderr.endswith("; run: pip install 'torch>=2.11'\n")


def test_diagnosis_says_which_path_each_device_takes(monkeypatch):
    import torch

    from bayes_kernels.diagnosis import paths

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((7, 5), (9, 0))[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ("T4", "H100")[i])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    info = {**bk.build_info(), "cuda": "13.0", "cuda_architectures": "80-real 90"}
    monkeypatch.setattr(_library, "build_info", lambda: info)
    monkeypatch.setattr(_library, "_has_cuda", lambda: True)
    text = paths()
    assert "cuda:0: plain PyTorch on T4 (sm_75), slower: the GPU is sm_75" in text
    assert "cuda:1: fused kernels on H100 (sm_90)\n" in text
    assert "mps: plain PyTorch, slower: there are no kernels for mps devices" in text
    assert "CUDA 13.0 kernels for 80-real 90" in text


def summary(**environment: str) -> list[str]:
    """Lines of `print_summary` between versions and the last, of a process that imports no torch."""
    program = (
        "import sys; from bayes_kernels.diagnosis import print_summary\n"
        "print_summary(); print({'torch', 'numpy', 'typer'} & {*sys.modules})"
    )
    ended = python(program, **environment)
    assert ended.returncode == 0, ended.stderr
    first, second, *lines, last, imported = ended.stdout.splitlines()
    assert first.startswith("bayes_kernels ") and second.startswith("packages: torch 2.")
    assert (last, imported) == (LAST, "set()")
    return lines


def test_the_summary_says_what_was_compiled_as_the_diagnosis_does():
    lines = summary()
    assert lines[0].startswith(f"compiled ops: {find_library(LIBRARY)} (")
    whole = diagnosis.paths().splitlines()
    assert whole[1 : 1 + len(lines)] == lines and whole[1 + len(lines)].startswith("  cpu: ")


def test_the_summary_reads_the_library_of_a_named_folder(tmp_path):
    """And nothing of others: an emulator elsewhere is not there."""
    shutil.copy(find_library(LIBRARY), tmp_path)
    lines = summary(BAYES_KERNELS_LIBRARY=str(tmp_path))
    assert lines[0].startswith(f"compiled ops: {tmp_path / LIBRARY} (")
    assert len(lines) == 2 and "on the host emulator" not in lines[1]
    if find_library(EMULATOR) is None:
        pytest.skip("the emulator is not built")
    shutil.copy(find_library(EMULATOR), tmp_path / LIBRARY)
    _, cuda = summary(BAYES_KERNELS_LIBRARY=str(tmp_path))
    assert cuda.startswith("  no CUDA kernels (no nvcc at build time")


def test_the_summary_says_what_to_do_without_a_library(tmp_path):
    cure = (
        f"  what to do: reinstall with .*BAYES_KERNELS_LIBRARY to the folder that holds {LIBRARY}"
    )
    found, advice = summary(BAYES_KERNELS_LIBRARY=str(tmp_path))
    place = f"{tmp_path} (BAYES_KERNELS_LIBRARY)"
    assert found == f"compiled ops: NOT FOUND: {LIBRARY} was not found in {place}"
    assert re.fullmatch(cure, advice)
    content = find_library(LIBRARY).read_bytes()
    for damaged, text in ((b"not a library", "a library of this release"), (content[:-9], "bytes")):
        (tmp_path / LIBRARY).write_bytes(damaged)
        found, advice = summary(BAYES_KERNELS_LIBRARY=str(tmp_path))
        assert found.startswith(f"compiled ops: NOT RECOGNISED: {tmp_path / LIBRARY}: expected ")
        assert text in found and re.fullmatch(cure, advice)


@pytest.mark.parametrize("version", ["2.10.1+cu128", "1.13", "2.9.0a0+git1234", None])
def test_the_summary_says_that_torch_is_too_old_or_missing(
    version: str | None, monkeypatch: pytest.MonkeyPatch
):
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    if version is None:
        assert "torch: expected" not in diagnosis.compiled()  # it can be imported, whatever it is
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert diagnosis.compiled().splitlines()[-1] == (
        f"torch: expected 2.11 or later, got {version or 'none'}; run: pip install 'torch>=2.11'"
    )


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0a0+git1234", "2.13.0+cpu", "3.0"])
def test_a_torch_that_the_library_was_compiled_for_needs_no_words(
    version: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert "torch: expected" not in diagnosis.compiled()
