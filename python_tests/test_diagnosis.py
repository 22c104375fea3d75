"""What `python -m bayes_kernels` says of versions, devices and a library that does not load."""

from __future__ import annotations

import subprocess
import sys

from programs import python, run_command

import bayes_kernels as bk
from bayes_kernels import _library


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
    for words in ("", ", 'info'"):
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
