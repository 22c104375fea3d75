"""Our predictions of a saved folder beside the published formulas, written here in plain PyTorch.

The published codes draw in each forward pass, by torch's generator; ours are functions of a key. So the laws
are compared, over a thousand draws: means, variances, quantiles, of single examples and of pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import adapted, fill, llama
from torch import Tensor, nn

from bayes_kernels.hf import BlobConfig, ScalablConfig, bayesianize, predict

DRAWS = 1000
CHOICES = [5, 6, 7]
IDS = torch.randint(3, 64, (3, 5), generator=torch.Generator().manual_seed(6))
MASK = torch.ones_like(IDS)
MASK[1, :2] = 0  # padded on the left, as the published code does
BATCH = {"input_ids": IDS, "attention_mask": MASK}
LAYERS = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")]
PREFIX = "base_model.model."
SCALING = 2.0
Update = Callable[[Tensor, dict[str, Tensor], torch.Generator], Tensor]


def base() -> Any:
    return llama(initializer_range=0.2)


def published(folder: Path, update: Update, seed: int = 10) -> Tensor:
    """(S, B, C) log-probabilities of the answers, S passes with the update of the weights as published.

    The passes are one batch, in which each has noise of its own: copy s of the examples is pass s. Seed 0
    would be the base's: eps would be its weights again.
    """
    model = base()
    saved = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name in LAYERS:
        prefix = f"{PREFIX}{name}."
        own = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}

        def hook(layer: nn.Module, inputs: Any, out: Tensor, own: Any = own) -> Tensor:
            x = inputs[0].unflatten(0, (DRAWS, -1))  # (S, B, T, n)
            return out + SCALING * update(x, own, generator).flatten(0, 1)

        model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        copies = {name: value.repeat(DRAWS, 1) for name, value in BATCH.items()}
        logits = model(**copies).logits[:, -1, CHOICES]
    return logits.unflatten(0, (DRAWS, -1)).double().log_softmax(-1)


def flipped(x: Tensor, mean: Tensor, omega: Tensor, b: Tensor, generator: Any) -> Tensor:
    """The update of a pass: eps once, signs for each token of each example (arXiv 2406.11675, its code)."""
    draws, r = x.shape[0], mean.shape[0]
    e = omega * torch.randn(draws, *mean.shape, generator=generator)
    signs_in = torch.randint(2, x.shape, generator=generator) * 2.0 - 1
    signs_out = torch.randint(2, (*x.shape[:-1], r), generator=generator) * 2.0 - 1
    noise = torch.einsum("sbtn,srn->sbtr", x * signs_in, e) * signs_out
    return (x @ mean.T + noise) @ b.T


def blob(x: Tensor, own: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    omega = own["lora_A_rho"] ** 2
    return flipped(x, own["lora_A.weight"], omega, own["lora_B.weight"], generator)


def tfb(x: Tensor, own: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """Of the plain adapter: B = U d V^T, B' = U d, A' = V^T A, deviations sigma_q / d (arXiv 2412.05723)."""
    u, d, vt = torch.linalg.svd(own["lora_B.weight"], full_matrices=False)
    omega = (own["sigma_q"] / (d + 1e-6))[:, None].expand_as(own["lora_A.weight"])
    return flipped(x, vt @ own["lora_A.weight"], omega, u * d, generator)


def scalabl(x: Tensor, own: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """One s for all examples and tokens of a pass (arXiv 2506.21408, its code)."""
    s = own["lora_log_s"].exp()
    eps = torch.randn(x.shape[0], 1, 1, len(s), generator=generator)
    drawn = s + own["lora_log_s_sigma"].exp() * eps
    return ((x @ own["lora_A.weight"].T) * drawn) @ own["lora_B.weight"].T


def differences(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """The largest z-scores of means and variances, and the largest distance of distribution functions.

    Looked at are all log-probabilities, and their differences between examples.
    """

    def seen(z: Tensor) -> Tensor:
        return torch.cat([z, z - z.roll(1, 1)], 1).flatten(1)

    a, b = seen(ours), seen(theirs)
    n = len(a)

    def squares(v: Tensor) -> Tensor:
        return (v - v.mean(0)).square()

    means = (a.mean(0) - b.mean(0)) / ((a.var(0) + b.var(0)) / n).sqrt()
    spread = squares(a).var(0) + squares(b).var(0)
    variances = (squares(a).mean(0) - squares(b).mean(0)) / (spread / n).sqrt()
    both = torch.cat([a, b]).sort(0).values
    at = both.T.contiguous()
    below = [
        torch.searchsorted(v.T.sort(1).values.contiguous(), at, right=True) / n for v in (a, b)
    ]
    distance = float((below[0] - below[1]).abs().max()) * (n / 2) ** 0.5
    return {
        "mean": float(means.abs().max()),
        "variance": float(variances.abs().max()),
        "quantiles": distance,
    }


def agree(found: dict[str, float]) -> bool:
    """18 values are compared: 4 deviations, and a Kolmogorov distance of level 1e-4, leave chance no room."""
    return found["mean"] < 4 and found["variance"] < 4 and found["quantiles"] < 2.23


def ours(folder: Path, **options: Any) -> Tensor:
    model = PeftModel.from_pretrained(base(), str(folder)).eval()
    found = predict(
        model,
        BATCH,
        n_samples=DRAWS,
        samples_per_pass=DRAWS,
        choices=CHOICES,
        return_samples=True,
        **options,
    ).sample_log_probs
    assert found is not None
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved adapter of each method, and the plain one that TFB was made of, with sigma_q beside it."""
    generator = torch.Generator().manual_seed(3)
    made = {
        "blob": fill(adapted(base(), BlobConfig, lora_alpha=8), 0.3),  # of rank 4
        "scalabl": fill(adapted(base(), ScalablConfig, lora_alpha=8), None),
        "plain": fill(adapted(base(), LoraConfig, lora_alpha=8), None),
    }
    with torch.no_grad():
        for name, p in made["blob"].named_parameters():
            if "rho" in name:  # each element has a deviation of its own
                p.mul_(0.5 + torch.rand(p.shape, generator=generator))
        for name, p in made["scalabl"].named_parameters():
            if "log_s_sigma" in name:
                p.copy_(-1.5 + 0.3 * torch.randn(p.shape, generator=generator))
        first = next(p for name, p in made["plain"].named_parameters() if "lora_B" in name)
        first[:, 3] = first[:, 0] - 2 * first[:, 1]  # a direction that B has not
    place = tmp_path_factory.mktemp("adapters")
    found = {name: place / name for name in made}
    for name, model in made.items():
        model.save_pretrained(str(found[name]))
    search = {"tolerance": 1.0, "low": 0.05, "high": 0.08, "max_trials": 1, "n_samples": 2}
    report = bayesianize(made["plain"], "tfb", [BATCH], choices=CHOICES, progress=False, **search)
    found["tfb"] = place / "tfb"
    made["plain"].save_pretrained(str(found["tfb"]))
    file = found["plain"] / "adapter_model.safetensors"
    sigma = {f"{PREFIX}{name}.sigma_q": torch.tensor(report.sigma) for name in LAYERS}
    save_file({**load_file(file), **sigma}, file)
    return found


@pytest.mark.parametrize(
    ("method", "source", "update", "options"),
    [
        ("blob", "blob", blob, {"scope": "token"}),
        ("tfb", "plain", tfb, {"scope": "token"}),
        ("scalabl", "scalabl", scalabl, {"draws": "independent"}),
    ],
)
def test_draws_of_a_saved_folder_have_the_published_law(
    folders: dict[str, Path], method: str, source: str, update: Update, options: dict[str, str]
) -> None:
    theirs = published(folders[source], update)
    mine = ours(folders[method], **options)
    assert theirs.std(0).min() > 0.05  # nats: the noise is no detail
    found = differences(mine, theirs)
    assert agree(found), found
    assert agree(differences(published(folders[source], update, seed=11), theirs))


def test_other_laws_are_told_apart(folders: dict[str, Path]) -> None:
    """One set of weights for all tokens, and deviations that are 44 % larger."""
    theirs = published(folders["blob"], blob)
    coherent = differences(ours(folders["blob"], draws="independent"), theirs)
    assert not agree(coherent), coherent

    def wider(x: Tensor, own: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        return blob(x, {**own, "lora_A_rho": own["lora_A_rho"] * 1.2}, generator)

    found = differences(published(folders["blob"], wider, seed=12), theirs)
    assert not agree(found), found
