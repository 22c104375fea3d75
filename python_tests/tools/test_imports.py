"""Every import runs downwards: no module needs itself, and a lower part knows no upper one."""

from __future__ import annotations

import grimp
from grimp import Layer

# Imports within functions and for type checkers count too: a part that names another one knows it.
GRAPH = grimp.build_graph("bayes_kernels", cache_dir=None)

# From the top down; all that is not named is below what is.
PARTS = {
    "bayes_kernels": ("__main__", "cli", "experiment", "hf"),
    "bayes_kernels.hf": ("methods",),
}


def test_there_is_no_circle():
    edges = {(a, b) for a in GRAPH.modules for b in GRAPH.find_modules_directly_imported_by(a)}
    circles = [f"{a} -> {b}" for a, b in edges if GRAPH.chain_exists(importer=b, imported=a)]
    assert not circles, "\n".join(["imports in a circle:", *sorted(circles)])


def test_no_import_runs_upwards():
    found = set()
    for package, upper in PARTS.items():
        lower = {m.rpartition(".")[2] for m in GRAPH.find_children(package)} - {*upper}
        layers = (*upper, Layer(*lower, independent=False))
        for wrong in GRAPH.find_illegal_dependencies_for_layers(layers, containers={package}):
            found |= {f"{a} -> {b}" for r in wrong.routes for a in r.heads for b in r.tails}
    assert not found, "\n".join(["from a lower part, and to an upper one:", *sorted(found)])
