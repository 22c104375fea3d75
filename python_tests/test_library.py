"""Loading the compiled library: without one, in strict mode, its paths of the CPU."""

from __future__ import annotations

import pytest
from programs import python

import bayes_kernels as bk

WITHOUT_LIBRARY = (
    "import torch, bayes_kernels as bk\n"
    "from bayes_kernels import functional as F\n"
    "key = bk.random.fold_in(bk.random.key(0), 1)\n"
    "a = torch.ones(2, 8, requires_grad=True)\n"
    "y = F.flipout_lora(torch.ones(3, 8), a, 0 * a, torch.ones(4, 2), key=key)\n"
    "y.sum().backward()\n"
    "print(y.mean().item(), a.grad.mean().item())\n"
)


def test_without_the_library_ops_are_plain_pytorch_with_one_warning(tmp_path):
    """As in a source tree where nothing was compiled."""
    result = python(WITHOUT_LIBRARY, BAYES_KERNELS_LIBRARY=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["16.0", "12.0"]
    assert result.stderr.count("UserWarning: bayes_kernels") == 1
    assert "libbayes_kernels.so was not found" in result.stderr
    assert "reinstall with" in result.stderr and "python -m bayes_kernels" in result.stderr


def test_strict_refuses_to_go_without_the_library(tmp_path):
    code = f"try:\n    exec({WITHOUT_LIBRARY!r})\nexcept ImportError as e:\n    print(e)"
    result = python(code, BAYES_KERNELS_LIBRARY=str(tmp_path), BAYES_KERNELS_STRICT="1")
    assert result.returncode == 0, result.stderr
    assert "libbayes_kernels.so was not found" in result.stdout
    assert "reinstall with" in result.stdout and result.stdout.count("\n") == 1


def test_build_info():
    info = bk.build_info()
    assert info["torch_target"] == "2.11"
    assert info["cpu_path"] in ("baseline", "avx2", "avx512")


@pytest.mark.parametrize("wanted", ["baseline", "avx2"])
def test_cpu_path_can_be_lowered(wanted: str):
    result = python(
        "import bayes_kernels as bk; print(bk.build_info()['cpu_path'])", BAYES_KERNELS_CPU=wanted
    )
    order = ["baseline", "avx2", "avx512"]
    assert order.index(result.stdout.strip()) <= order.index(wanted)
