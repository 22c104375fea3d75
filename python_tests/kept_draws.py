"""What the CPU library says of the draws of noise that it keeps (csrc/kept_draws.h)."""

from __future__ import annotations

import ctypes

from bayes_kernels import _library


class KeptDraws:
    """What the CPU library says of the draws that it keeps."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(_library.find_library("libbayes_kernels.so")))
        self.library.bayes_kernels_forget_draws.argtypes = [ctypes.c_int64]

    def _figure(self, place: int) -> int:
        figures = (ctypes.c_int64 * 4)()
        self.library.bayes_kernels_kept_draws(figures)
        return figures[place]

    limit, bytes, hits, known = (property(lambda self, i=i: self._figure(i)) for i in range(4))

    def forget(self, limit: int = -1) -> None:
        """Forget all; another limit in bytes where it is given."""
        self.library.bayes_kernels_forget_draws(limit)
