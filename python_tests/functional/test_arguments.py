"""What ops say to wrong arguments, and what they do where no kernel takes their tensors."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bayes_kernels import _library, optim, random
from bayes_kernels import functional as F

# --- every public op ----------------------------------------------------------------------------


class Op(NamedTuple):
    """A public op: its arguments by name, and which of them are tensors or lists of tensors."""

    call: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    written: tuple[str, ...] = ()


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + 7 * len(size)))


def adapter(**more: Any) -> dict[str, Any]:
    return {"x": normal(6, 9), "b": normal(5, 3), "base": normal(6, 5, seed=1), **more}


def talls(*names: str, **more: Any) -> dict[str, Any]:
    found = {
        name: [normal(12, 3, seed=i), normal(7, 2, seed=i + 1)] for i, name in enumerate(names)
    }
    return {**found, **more}


def linear(**more: Any) -> dict[str, Any]:
    return {
        "features": normal(4, 6),
        "weight_mean": normal(3, 6),
        "weight_scale": normal(3, 6),
        **more,
    }


def spread(*size: int) -> Tensor:
    return normal(*size).abs() + 0.1


KEY = random.key(3)
KL = {"prior_std": 0.5}
OPS: dict[str, Op] = {
    "lora": Op(F.lora, lambda: adapter(a=normal(3, 9), dropout=0.2, key=KEY)),
    "flipout_lora": Op(
        F.flipout_lora, lambda: adapter(mean=normal(3, 9), rho=spread(3, 9), key=KEY)
    ),
    "scaled_lora": Op(F.scaled_lora, lambda: adapter(a=normal(3, 9), d=normal(3))),
    "core_lora": Op(F.core_lora, lambda: adapter(a=normal(3, 9), core=normal(3, 3))),
    "gaussian_kl": Op(F.gaussian_kl, lambda: {**talls("means"), "rhos": [spread(12, 3), spread(7, 1)], **KL}),
    "kl_step_": Op(
        optim.kl_step_,
        lambda: {**talls("means"), "rhos": [spread(12, 3), spread(7, 1)], "weight": 0.1, **KL},
        ("means", "rhos"),
    ),
    "gram": Op(F.gram, lambda: talls("xs")),
    "polar_retract_": Op(F.polar_retract_, lambda: talls("xs", "steps"), ("xs",)),
    "qr_retract_": Op(F.qr_retract_, lambda: talls("xs", "steps"), ("xs",)),
    "stiefel_step_": Op(F.stiefel_step_, lambda: talls("xs", "directions", lr=0.1), ("xs",)),
    "landing_field": Op(F.landing_field, lambda: talls("xs", "grads", lam=0.5)),
    "landing_step_": Op(F.landing_step_, lambda: talls("xs", "grads", lr=0.1, lam=0.5), ("xs",)),
    "kron_accumulate_": Op(
        F.kron_accumulate_,
        lambda: {"factors": [torch.eye(4)], "rows": [normal(6, 4)], "masks": [spread(6)]},
        ("factors",),
    ),
    "low_rank_update_": Op(
        F.low_rank_update_,
        lambda: {"factors": [normal(8, 2)], "rows": [normal(3, 8)], "masks": [spread(3)]},
        ("factors",),
    ),
    "mc_predict": Op(
        F.mc_predict, lambda: {"mean": normal(4, 3), "cov": spread(4, 3), "n_samples": 20, "key": KEY}
    ),
    "mc_predict_linear": Op(F.mc_predict_linear, lambda: linear(n_samples=20, key=KEY)),
    "linear_logits": Op(F.linear_logits, lambda: linear(noise_var=spread(3))),
    "fold_in": Op(random.fold_in, lambda: {"key": KEY, "data": 5}),
    "normal": Op(random.normal, lambda: {"key": KEY, "size": (3, 5)}),
    "sign_bits": Op(random.sign_bits, lambda: {"key": KEY, "rows": 4, "columns": 130}),
    "dropout_mask": Op(random.dropout_mask, lambda: {"key": KEY, "rows": 4, "columns": 9, "p": 0.3}),
}  # fmt: skip


def tensors_of(arguments: dict[str, Any]) -> list[str]:
    return [
        name
        for name, value in arguments.items()
        if isinstance(value, Tensor) or (isinstance(value, list) and isinstance(value[0], Tensor))
    ]


PAIRS = [(op, name) for op, made in OPS.items() for name in tensors_of(made.arguments())]


def replaced(value: Any, change: Callable[[Tensor], Any]) -> Any:
    return [change(value[0]), *value[1:]] if isinstance(value, list) else change(value)


def nested(t: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([t, t])


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "text": lambda t: "weights.pt",
    "list": lambda t: [[1.0, 2.0], [3.0, 4.0]],
    "array": lambda t: t.numpy(),
    "sparse": lambda t: t.to_sparse(),
    "nested": nested,
    "meta": lambda t: t.to("meta"),
    "complex": lambda t: t.to(torch.complex64),
    "bool": lambda t: torch.ones(t.shape, dtype=torch.bool) if t.dtype == torch.int64 else t.to(torch.int16),
    "shape": lambda t: torch.ones(3, 1, 1, dtype=t.dtype),
}  # fmt: skip


def refuses(op: Op, arguments: dict[str, Any]) -> str:
    """The one line with which the op refuses, before it has changed a bit."""
    before = {name: [t.clone() for t in arguments[name] if isinstance(t, Tensor) and not t.is_nested]
              for name in op.written if isinstance(arguments[name], list)}  # fmt: skip
    with pytest.raises((TypeError, ValueError)) as caught:
        op.call(**arguments)
    text = str(caught.value)
    assert "\n" not in text and ": " in text and "got" in text, text
    for name, old in before.items():
        now = [t for t in arguments[name] if isinstance(t, Tensor) and not t.is_nested]
        for one, other in zip(now, old, strict=True):
            if one.layout is torch.strided and not one.is_meta:
                assert torch.equal(one, other)
    return text


@pytest.mark.parametrize(("op", "name"), PAIRS, ids=[f"{o}-{n}" for o, n in PAIRS])
def test_wrong_tensors_are_refused_in_one_line(op, name):
    """Each tensor argument of each op: no tensor, not dense, without data, of another type or shape."""
    for kind, change in WRONG.items():
        arguments = OPS[op].arguments()
        arguments[name] = replaced(arguments[name], change)
        text = refuses(OPS[op], arguments)
        assert text.split(":")[0] in (op, "mc_predict", "linear_logits"), f"{kind}: {text}"


_NUMBERS = {
    "lora": "scaling dropout stream row0",
    "flipout_lora": "scaling dropout stream row0 rows_per_group",
    "scaled_lora": "scaling",
    "core_lora": "scaling",
    "gaussian_kl": "prior_std",
    "kl_step_": "prior_std weight",
    "stiefel_step_": "lr",
    "landing_field": "lam",
    "landing_step_": "lr lam",
    "kron_accumulate_": "alpha beta",
    "mc_predict": "n_samples stream row0",
    "linear_logits": "noise_var",
}
NUMBERS = [(op, name) for op, names in _NUMBERS.items() for name in names.split()]


@pytest.mark.parametrize(("op", "name"), NUMBERS, ids=[f"{o}-{n}" for o, n in NUMBERS])
def test_wrong_numbers_are_refused_in_one_line(op, name):
    for wrong in ("0.5", {"value": 1}, [[0.5]]):
        text = refuses(OPS[op], OPS[op].arguments() | {name: wrong})
        assert name in text


def test_flipout_without_a_deviation_is_refused():
    """Not taken as plain LoRA, with or without gradients."""
    arguments = OPS["flipout_lora"].arguments() | {"rho": None}
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert "rho must be a tensor, got NoneType" in refuses(OPS["flipout_lora"], arguments)
    arguments = OPS["flipout_lora"].arguments() | {"key": None}
    assert "key must be a tensor" in refuses(OPS["flipout_lora"], arguments)


@pytest.mark.parametrize("name", ["lora", "flipout_lora", "scaled_lora", "core_lora"])
def test_integers_are_refused_under_autocast_too(name):
    arguments = OPS[name].arguments()
    arguments["x"] = arguments["x"].long()
    with torch.autocast("cpu"):
        assert "x must be float32" in refuses(OPS[name], arguments)


# --- memory -------------------------------------------------------------------------------------

IN_PLACE = [name for name, op in OPS.items() if op.written]


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_changed_must_not_overlap(device, name):
    """Itself, another one of the list, or an input: also where a copy would hide it from the op."""
    op = OPS[name]

    def given() -> dict[str, Any]:
        return {
            k: [t.to(device.torch) for t in v] if isinstance(v, list) else v
            for k, v in op.arguments().items()
        }

    written = op.written[0]
    others = [k for k in given() if k not in op.written and isinstance(given()[k], list)]
    twice = given()
    for k in (*op.written, *others):
        twice[k] = [twice[k][0], twice[k][0]]
    assert "overlap" in refuses(op, twice)
    shape = tuple(given()[written][0].shape)
    expanded = given()
    expanded[written][0] = torch.ones(shape[0], 1, device=device.torch).expand(shape)
    assert "overlap itself" in refuses(op, expanded) or name == "kl_step_"
    if name == "kl_step_":
        shared = given()
        shared["rhos"][0] = shared["means"][0]
        assert "overlap" in refuses(op, shared)
        flat = torch.ones(shape[0] * shape[1] + 4, device=device.torch)
        shared["means"][0], shared["rhos"][0] = flat[:-4].view(shape), flat[4:].view(shape)
        assert "overlap" in refuses(op, shared)
        return
    if name.endswith(("retract_", "step_")):  # also of copies that are made
        turned = torch.ones(shape[::-1], device=device.torch).T
        strided = given()
        for k in (*op.written, *others):
            strided[k] = [turned, turned.clone()]
        strided[others[0]][1] = turned
        assert "no input may overlap" in refuses(op, strided)
    part = given()
    rows = part[others[0]][0]
    flat = torch.ones(rows.numel() + 8, device=device.torch)
    part[others[0]][0] = flat[: rows.numel()].view(rows.shape)
    numel = part[written][0].numel()
    assert numel <= flat.numel()
    part[written][0] = flat[flat.numel() - numel :].view(shape)
    assert "overlap" in refuses(op, part)


def test_columns_of_one_matrix_do_not_overlap(device):
    wide = normal(12, 6).to(device.torch)
    xs = [wide[:, :3], wide[:, 3:]]
    expected = [x.clone() for x in xs]
    F.polar_retract_(expected)
    F.polar_retract_(xs)
    for x, e in zip(xs, expected, strict=True):
        assert torch.equal(x, e)


def test_flow_refuses_a_parameter_that_comes_twice():
    mean, rho = normal(3, 4), spread(3, 4)
    with pytest.raises(ValueError, match="must not overlap"):
        optim.kl_flow_([mean, mean], [rho, spread(3, 4)], 0.1, 0.5)


def test_memory_that_is_not_there_is_an_error_of_one_line():
    """Outputs larger than the address space: before anything is written, and the process goes on."""
    code = """
import resource, torch
from bayes_kernels import functional as F, random
F.lora(torch.ones(2, 8), torch.ones(2, 8), torch.ones(4, 2))
torch.linalg.qr(torch.ones(4, 2))
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), used + (1 << 28)))
wide = torch.ones(1, 8).expand(1 << 28, 8)
key = random.key(0)
many = torch.ones(1, 3).expand(1 << 30, 3)
row = torch.ones(1, 1).expand(1, 1 << 28)
a, b = torch.ones(2, 8, requires_grad=True), torch.ones(4, 2)
for call in (
    lambda: F.lora(wide, a, b),
    lambda: F.lora(wide, a.detach(), b),
    lambda: F.core_lora(wide, a, torch.ones(2, 2), b),
    lambda: random.normal(key, (1 << 40,)),
    lambda: F.mc_predict(many, many, n_samples=2, key=key),
    lambda: F.low_rank_update_([torch.ones(1, 2).expand(1 << 28, 2)], [row]),
):
    try:
        call()
        print('went through')
    except (RuntimeError, MemoryError, ValueError) as error:
        print(type(error).__name__, str(error).splitlines()[0])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert len(lines) == 6 and "went through" not in lines
    for line in lines[:-1]:
        assert "can't allocate memory" in line or "not enough memory" in line, line


# --- where there are no kernels -----------------------------------------------------------------


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process that has not yet warned, nor looked at a GPU."""
    monkeypatch.setattr(_library, "_told", set())
    monkeypatch.setattr(_library, "_with_kernels", set())
    monkeypatch.delenv("BAYES_KERNELS_STRICT", raising=False)
    yield monkeypatch


def without_library(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_library, "problem", "libbayes_kernels.so was not found")
    patch.setattr(_library, "ops", _library._Missing("libbayes_kernels.so was not found"))


def outcome(op: Op, arguments: dict[str, Any]) -> list[Tensor]:
    """The result, what was changed in place, and gradients where there are some."""
    given = [v for v in arguments.values() if isinstance(v, Tensor)]
    leaves = [v.requires_grad_() for v in given if v.is_floating_point()]
    found = op.call(**arguments)
    found = [found] if isinstance(found, Tensor) else [t for t in found or () if t is not None]
    grads: list[Tensor] = []
    if found and found[0].requires_grad:
        total = sum((t.float() * normal(*t.shape)).sum() for t in found)
        grads = [g for g in torch.autograd.grad(total, leaves, allow_unused=True) if g is not None]
    return [*found, *grads, *(t for name in op.written for t in arguments[name])]


WITH_KERNELS = [name for name in OPS if name != "linear_logits"]  # that is PyTorch's everywhere


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_without_the_library_ops_run_as_their_definitions_with_one_warning(name, quiet):
    expected = outcome(OPS[name], OPS[name].arguments())
    without_library(quiet)
    with pytest.warns(UserWarning) as caught:
        found = outcome(OPS[name], OPS[name].arguments())
        outcome(OPS[name], OPS[name].arguments())
    (warning,) = [str(w.message) for w in caught if "bayes_kernels" in str(w.message)]
    assert "libbayes_kernels.so was not found; reinstall with" in warning and "\n" not in warning
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        if name == "low_rank_update_" and ours.dim() == 2:  # up to the signs of columns
            ours, theirs = ours @ ours.T, theirs @ theirs.T
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_strict_makes_it_an_error(name, quiet):
    without_library(quiet)
    quiet.setenv("BAYES_KERNELS_STRICT", "1")
    arguments = OPS[name].arguments()
    with pytest.raises(ImportError, match=r"compiled ops are not available.*reinstall with"):
        OPS[name].call(**arguments)
    for k in OPS[name].written:
        for now, before in zip(arguments[k], OPS[name].arguments()[k], strict=True):
            assert torch.equal(now, before)


ARCHITECTURES = "80-real 90a-real 100-real 120"


@pytest.mark.parametrize(
    ("device", "capability", "double", "text"),
    [
        ("mps", None, False, "no kernels for mps devices; move model and data to the CPU"),
        ("xpu", None, False, "no kernels for xpu devices"),
        ("privateuseone", None, True, "no kernels for privateuseone devices"),
        ("cuda", (7, 5), False, "GPU is sm_75.*kernels need sm_80 or later"),
        ("cuda", (6, 1), True, "GPU is sm_61"),
        ("cuda", (9, 1), False, "GPU is sm_91.*BAYES_KERNELS_CUDA_ARCHITECTURES=91-real"),
        ("cuda", (11, 0), False, "compiled for 80-real 90a-real 100-real 120; reinstall"),
        ("cuda", (8, 0), True, "float64 has kernels on the CPU only; convert to float32"),
        ("cuda", (8, 0), False, None),
        ("cuda", (8, 9), False, None),
        ("cuda", (9, 0), False, None),
        ("cuda", (10, 3), False, None),
        ("cuda", (12, 0), False, None),
        ("cuda", (13, 0), False, None),
        ("cuda", None, False, None),
        ("cpu", None, True, None),
    ],
)
def test_which_devices_have_kernels(quiet, device, capability, double, text):
    quiet.setattr(_library, "_has_cuda", lambda: True)
    quiet.setattr(_library, "build_info", lambda: {"cuda_architectures": ARCHITECTURES})
    quiet.setattr(_library, "_capability", lambda index: capability)
    found = _library.lack_of_kernels(device, None, double)
    if text is None:
        assert found is None
        return
    assert found is not None
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(found[1])
    with pytest.warns(UserWarning, match=text) as caught:
        assert not _library._served(device, None, double)
        assert not _library._served(device, None, double)
    assert len(caught) == 1 and "BAYES_KERNELS_STRICT=1 makes this an error" in str(
        caught[0].message
    )
    quiet.setenv("BAYES_KERNELS_STRICT", "1")
    with pytest.raises(found[0], match=text):
        _library._served(device, None, double)


@pytest.mark.parametrize(
    ("compiled", "served", "refused"),
    [
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("86", [(8, 6), (8, 9), (9, 0), (12, 0)], [(8, 0)]),
        ("90a-real", [(9, 0)], [(9, 1), (10, 0), (8, 9)]),
        ("80-virtual", [(8, 0), (12, 0)], [(7, 5)]),
        ("100f-real", [(10, 0), (10, 3)], [(11, 0), (9, 0)]),
    ],
)
def test_which_gpus_an_image_serves(quiet, compiled, served, refused):
    quiet.setattr(_library, "build_info", lambda: {"cuda_architectures": compiled})
    for capabilities, expected in ((served, True), (refused, False)):
        assert [_library._has_image(c) for c in capabilities] == [expected] * len(capabilities)


@pytest.mark.filterwarnings("ignore:bayes_kernels")
def test_a_gpu_is_looked_at_once(quiet):
    """Every call of an op asks; a list asks for each of its tensors."""
    looked = []

    def capability(index: int | None) -> tuple[int, int]:
        looked.append(index)
        return (9, index or 0)

    quiet.setattr(_library, "_has_cuda", lambda: True)
    quiet.setattr(_library, "build_info", lambda: {"cuda_architectures": "90-real"})
    quiet.setattr(_library, "_capability", capability)
    assert _library._served("cuda", 0, False)
    looked.clear()
    assert _library._served("cuda", 0, False) and not looked
    quiet.setattr(_library, "build_info", lambda: {"cuda_architectures": "80-real"})
    assert not _library._served("cuda", 1, False) and not _library._served("cuda", 1, False)
    assert not _library._served("cuda", 0, True)


@pytest.mark.filterwarnings("ignore:bayes_kernels")
def test_a_gpu_that_is_only_traced_for_is_not_remembered(quiet):
    quiet.setattr(_library, "_has_cuda", lambda: True)
    quiet.setattr(_library, "_capability", lambda index: None)
    assert _library._served("cuda", 0, False)
    quiet.setattr(_library, "_has_cuda", lambda: False)
    assert not _library._served("cuda", 0, False)


def test_a_build_without_cuda_says_how_to_get_it(quiet):
    quiet.setattr(_library, "_has_cuda", lambda: False)
    found = _library.lack_of_kernels("cuda")
    assert found is not None and "reinstall with BAYES_KERNELS_CUDA=ON and nvcc" in found[1]
    quiet.setattr(torch.version, "hip", "6.4")
    found = _library.lack_of_kernels("cuda")
    assert found is not None and "AMD" in found[1]


class _NoDouble(TorchDispatchMode):
    """A GPU that has no fp64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for t in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(t, Tensor) and t.device.type == "cuda":
                assert t.dtype != torch.float64, func
        return found


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", ["old", "double", "no double"])
def test_ops_without_kernels_stay_on_their_device(name, kind, quiet):
    """On fake CUDA tensors: a GPU below sm_80, fp64 on a GPU, and a device that has no fp64."""
    if kind == "double" and not any(
        v.is_floating_point() for v in OPS[name].arguments().values() if isinstance(v, Tensor)
    ):
        pytest.skip("no floating-point argument")
    with fake_cuda():
        if kind != "double":  # whose keys have kernels
            quiet.setattr(_library, "ops", _library._Missing("not for this device"))
            quiet.setattr(_library, "_capability", lambda index: (7, 5))
            quiet.setattr(_library, "build_info", lambda: {"cuda_architectures": ARCHITECTURES})
        if kind == "no double":
            quiet.setattr(_library, "_WITHOUT_DOUBLE", {"cuda"})

        def moved(v: Any) -> Any:
            if isinstance(v, list):
                return [moved(t) for t in v]
            if not isinstance(v, Tensor):
                return v
            made = v.to(torch.float64) if kind == "double" and v.is_floating_point() else v
            made = torch.empty(made.shape, dtype=made.dtype, device=CUDA)
            return made

        arguments = {k: moved(v) for k, v in OPS[name].arguments().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mode = _NoDouble() if kind == "no double" else torch.no_grad()
            with mode:
                found = OPS[name].call(**arguments)
        for t in found if isinstance(found, (tuple, list)) else (found,):
            assert t is None or t.device == CUDA
    assert os.environ.get("BAYES_KERNELS_STRICT") is None
