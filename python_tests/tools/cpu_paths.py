"""The ops' tests on every CPU path that the processor has beside the one that it takes by itself.

The library chooses its path when it is loaded, so that each needs processes of its own. What is passed on
the command line goes to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import bayes_kernels as bk

TESTS = Path(__file__).resolve().parents[1]
PATHS = ("baseline", "avx2", "avx512")  # a processor that has one has those before it
FILES = [
    TESTS / "test_random.py",
    *(
        TESTS / "functional" / f"test_{name}.py"
        for name in (
            "activations",
            "adapter",
            "adapter_gradients",
            "adapter_group",
            "few_tokens",
            "grouped",
            "tall",
            "predict",
            "curvature",
            "divergence",
            "tiles",
            "fuzz",
        )
    ),
]


def main(arguments: list[str]) -> int:
    own = bk.build_info()["cpu_path"]
    others = PATHS[: PATHS.index(own)]
    print(f"CPU paths tested: {', '.join([*others, own])} ({own} with the whole suite)", flush=True)
    for path in others:
        print(f"== ops on the {path} path", flush=True)
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--device", "cpu", *FILES, *arguments],
            env={**os.environ, "BAYES_KERNELS_CPU": path},
        )
        if run.returncode != 0:
            return run.returncode
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
