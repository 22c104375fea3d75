"""The table of methods, in the order of listing."""

from __future__ import annotations

from ..method import register
from . import blob, dropout, ensemble, laplace, plain, polar, polar_vbll, scalabl, tfb

for _method in (
    plain.METHOD,
    plain.MAP,
    dropout.METHOD,
    ensemble.METHOD,
    blob.METHOD,
    tfb.METHOD,
    laplace.METHOD,
    laplace.LAST_LAYER,
    scalabl.METHOD,
    polar.METHOD,
    polar_vbll.METHOD,
):
    register(_method)
