"""Whether a wheel of the package works where nothing else is: python python_tests/tools/check_wheel.py WHEEL

    --torch torch==2.11.0   what to install beside it; by default torch as it is here
    --python PATH           interpreter of the new environment; by default this one

In a new virtual environment with torch and the wheel alone: the symbols that its library asks for are old
enough for manylinux_2_28, it imports without transformers, the ops give right numbers, and an error in C++
arrives as one in Python. Prints the sizes. `make wheel-test` builds the wheel first. Of a library (.so) in
place of a wheel only the symbols are checked.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# What manylinux_2_28 has, by which torch's own wheels are built: glibc 2.28 and GCC 8.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}

IN_A_NEW_ENVIRONMENT = """
import importlib.util, sys, torch
import bayes_kernels as bk
from bayes_kernels import functional, random, reference

for name in ("transformers", "peft", "accelerate"):
    assert importlib.util.find_spec(name) is None and name not in sys.modules, name
info = bk.build_info()
print("torch", torch.__version__, info)

def near(got, want, what):
    error = float((got.detach().double() - want).abs().max() / want.detach().abs().max())
    assert error < 1e-5, f"{what}: off by {error}"

g = torch.Generator().manual_seed(0)
x, a, b = (torch.randn(s, generator=g, requires_grad=True) for s in ((33, 64), (4, 64), (48, 4)))
y = functional.lora(x, a, b, scaling=0.5)
near(y, 0.5 * x.double() @ a.double().T @ b.double().T, "lora")
y.sum().backward()
near(a.grad, 0.5 * b.double().sum(0)[:, None] * x.double().sum(0), "gradient of lora")
key, rho = random.key(1), torch.full((4, 64), 0.1)
noisy = functional.flipout_lora(x, a, rho, b, key=key)
dense = reference.dense_noise(key, 33, 64, 4)
dense = reference.DenseNoise(dense.eps.double(), dense.r_in.double(), dense.r_out.double())
near(noisy, reference.flipout_lora(*(t.double() for t in (x, a, rho, b)), noise=dense), "flipout")
z = [torch.randn(200, 8, generator=g)]
u, _, vh = torch.linalg.svd(z[0].double(), full_matrices=False)
functional.polar_retract_(z)
near(z[0], u @ vh, "polar")
p = functional.mc_predict(torch.zeros(3, 4), torch.ones(3, 4), n_samples=1000, key=key)
near(p.log_probs.exp().sum(1), torch.ones(3).double(), "mc_predict")

# An exception crosses from our library through torch's into Python, with its text.
for number in range(100):
    try:
        torch.ops.bayes_kernels.tall_gram([torch.zeros(2, 3)])
    except RuntimeError as error:
        assert "must be tall" in str(error), error
    else:
        raise AssertionError("no error")
try:
    functional.lora(x, a, b[:, :2])
except ValueError as error:
    print("errors arrive:", error)
"""


def versions(library: Path) -> set[str]:
    """The versions of symbols that a shared library asks others for, as GLIBC_2.14."""
    command = ["readelf", "--version-info", "--wide", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needs = text.partition("Version needs section")[2]
    return set(re.findall(r"Name: (\w+_[0-9.]+)", needs))


def too_new(found: set[str]) -> list[str]:
    """Those that a machine of manylinux_2_28 lacks."""

    def missing(version: str) -> bool:
        name, _, number = version.rpartition("_")
        parts = tuple(int(part) for part in number.split("."))
        return name not in NEWEST or parts > NEWEST[name]

    return sorted(filter(missing, found))


def check_symbols(what: str, library: Path) -> None:
    """Raises where a library needs newer symbols than manylinux_2_28 has.

    Raises:
        SystemExit: naming them.
    """
    odd = too_new(versions(library))
    if odd:
        sys.exit(f"{what} must load on manylinux_2_28, got symbols of {', '.join(odd)}")


def check(wheel: Path, torch: str, python: str) -> None:
    """Raises where anything is wrong.

    Raises:
        SystemExit: with what is wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(folder, "files"))
        libraries = sorted(Path(folder, "files").rglob("*.so*"))
        if [path.name for path in libraries] != ["libbayes_kernels.so"]:
            sys.exit(f"{wheel.name} must hold libbayes_kernels.so alone, got {libraries}")
        check_symbols(wheel.name, libraries[0])
        megabytes = [path.stat().st_size / 1e6 for path in (wheel, libraries[0])]
        print(f"{wheel.name}: {megabytes[0]:.1f} MB, its library {megabytes[1]:.1f} MB")
        place = Path(folder, "venv")
        subprocess.run([python, "-m", "venv", str(place)], check=True)
        new = str(place / "bin" / "python")
        install = [new, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, torch, "numpy", str(wheel)], check=True)
        run = subprocess.run([new, "-I", "-c", IN_A_NEW_ENVIRONMENT], cwd=folder, check=False)
        if run.returncode:
            sys.exit(f"{wheel.name} does not work beside {torch}")
        subprocess.run([new, "-m", "bayes_kernels"], cwd=folder, check=True)
    print("works")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch")
    parser.add_argument("--python", default=sys.executable)
    given = parser.parse_args()
    if given.wheel.suffix == ".so":
        check_symbols(str(given.wheel), given.wheel)
        print(f"{given.wheel}: {given.wheel.stat().st_size / 1e6:.1f} MB, loads on manylinux_2_28")
        return
    if given.torch is None:
        from importlib.metadata import version

        given.torch = f"torch=={version('torch').partition('+')[0]}"
    check(given.wheel.resolve(), given.torch, given.python)


if __name__ == "__main__":
    main()
