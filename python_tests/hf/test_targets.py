"""Adapters on convolutions and embeddings, which are linear on patches and on one-hot vectors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import fingerprint, gpt2, llama, logits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import SequenceClassifierOutput

from bayes_kernels import functional, random, reference
from bayes_kernels.hf import (
    BlobConfig,
    PolarConfig,
    ScalablConfig,
    bayesianize,
    export_lora,
    fold_samples,
    import_lora,
    kl_divergence,
    posterior,
    predict,
)
from bayes_kernels.hf.checkpoints import read_lora
from bayes_kernels.hf.kl import decoupled_kl
from bayes_kernels.hf.layers import bayes_layers
from bayes_kernels.hf.targets import as_linear, factor_parameters, patches

pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY = 150  # signs come in blocks of 128 columns
IDS = torch.randint(0, VOCABULARY, (6, 5), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """One layer of each kind; what is called with (B, T) tokens gives logits (B, 3)."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, 8, padding_idx=2)
        self.line = nn.Conv1d(8, 6, 3, **{"stride": 2, "padding": 1, **options})
        self.plane = nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding="valid")
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        h = self.line(self.table(input_ids).transpose(1, 2))  # (B, 6, 3)
        h = self.plane(h.reshape(len(h), 3, 3, 2))  # (B, 4, 1, 1)
        return self.head(h.flatten(1).repeat(1, 4))


class Classifier(Net):
    """The same with an output that `predict` reads."""

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SequenceClassifierOutput(logits=super().forward(input_ids))


KINDS = ("table", "line", "plane")
CONFIGS = {
    "blob": BlobConfig,
    "scalabl": ScalablConfig,
    "scalabl-full": lambda **options: ScalablConfig(covariance="full", **options),
}
PAIRS = [("blob", kind) for kind in KINDS]
PAIRS += [(method, kind) for method in ("scalabl", "scalabl-full") for kind in ("line", "plane")]


def adapted(
    target: str | list[str], config: Any = BlobConfig, base: nn.Module | None = None, **options: Any
) -> PeftModel:
    """An adapter that does something, deviations included."""
    targets = [target] if isinstance(target, str) else target
    given = {"r": 4, "lora_alpha": 6, "target_modules": targets, **options}
    model = get_peft_model(base or Net(), config(**given))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "rho" in name:
                p.copy_(0.4 + 0.3 * torch.rand(p.shape, generator=generator))
            elif "lora_" in name and "log" not in name and "eigen" not in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return model.eval()


def layer_of(model: PeftModel) -> Any:
    """PEFT's layer."""
    return bayes_layers(model)[0].layer


def b_of(model: PeftModel) -> Any:
    return factor_parameters(layer_of(model), "default")[1]


def inputs_of(target: str, rows: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if target == "table":
        return IDS[:rows]
    shape = {"line": (rows, 8, 7), "plane": (rows, 3, 5, 6)}[target]
    return torch.randn(shape, generator=generator)


def with_weight(model: PeftModel, target: str, delta: Tensor, x: Tensor) -> Tensor:
    """What the base layer gives for x in fp64, with its weight changed by B A (m, n)."""
    base = copy.deepcopy(getattr(Net(), target)).double()
    with torch.no_grad():
        base.weight += delta.T if target == "table" else delta.reshape(base.weight.shape)
    return base(x if target == "table" else x.double())


def factors(model: PeftModel, draw: int | None = None, seed: int = 0) -> Tensor:
    """scaling B A of the mean or of a draw, fp64."""
    a, b = bayes_layers(model)[0].factors(draw, seed)
    return 1.5 * b.double() @ a.double()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("method", "target"), PAIRS)
@torch.no_grad()
def test_mean_is_the_layer_with_the_update_in_its_weight(method: str, target: str) -> None:
    model = adapted(target, CONFIGS[method])
    layer, x = layer_of(model), inputs_of(target)
    expected = with_weight(model, target, factors(model), x)
    close(layer(x), expected)
    assert (layer(x) - getattr(Net(), target)(x)).abs().max() > 0.1
    close(
        layer.get_delta_weight("default").flatten(),
        (factors(model).T if target == "table" else factors(model)).flatten(),
    )


@pytest.mark.parametrize("target", KINDS)
@torch.no_grad()
def test_mean_is_plain_lora_of_the_same_factors(target: str, tmp_path: Path) -> None:
    model = adapted([target, "head"])
    export_lora(model, tmp_path)
    plain = PeftModel.from_pretrained(Net(), tmp_path).eval()
    close(model(IDS), plain(IDS))
    ours = dict(model.named_parameters())
    for name, value in plain.named_parameters():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("law", ["antithetic", "independent"])
@pytest.mark.parametrize(("method", "target"), PAIRS)
@torch.no_grad()
def test_rows_have_their_draws(method: str, target: str, law: str) -> None:
    model = adapted(target, CONFIGS[method])
    layer, x = layer_of(model), inputs_of(target)
    ids = [3, 0, 3, 8, 1, 0]
    with posterior(model, draws=ids, seed=7, kind=law):
        found = layer(x)
    mean = layer(x)
    for row, number in enumerate(ids):
        with posterior(model, first_sample=number, seed=7, kind=law):
            alone = layer(x[row : row + 1])
        close(found[row], alone[0])
        if law == "antithetic":
            weights = with_weight(model, target, factors(model, number, 7), x[row : row + 1])
            close(found[row], weights[0])
        assert (found[row] - mean[row]).abs().max() > 0.02
    with posterior(model, n_samples=2, seed=7, kind=law):
        folded = layer(x)  # two copies of three rows, here with other content
    with posterior(model, draws=[0, 0, 0, 1, 1, 1], seed=7, kind=law):
        close(folded, layer(x))


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("std", ["square", "softplus", "direct"])
@torch.no_grad()
def test_draws_have_the_law_of_the_posterior(target: str, std: str) -> None:
    model = adapted(target, std=std)
    item = bayes_layers(model)[0]
    n = 4000
    key = random.key(5)
    drawn = torch.stack(
        [
            item.variant.draw_factors(as_linear(layer_of(model)), "default", key, 2 * i)[0]
            for i in range(n)
        ]
    )
    mean = item.mean.flatten(1)
    expected = reference.std_of(item.rho, std).flatten(1)
    z = (drawn - mean) / expected
    assert float(z.mean(0).abs().max()) < 5 / n**0.5
    assert float((z.square().mean(0) - 1).abs().max()) < 5 * (2 / n) ** 0.5
    assert abs(float((z[:, 0, 0] * z[:, 1, 1]).mean())) < 4 / n**0.5


# --- the noise of training: the ops' own, on patches and one-hot vectors --------------------------


def as_op(model: PeftModel, x: Tensor, target: str, **options: Any) -> Tensor:
    """functional.flipout_lora on the explicit linear input of the layer."""
    item = bayes_layers(model)[0]
    layer = layer_of(model)
    base = layer.get_base_layer()
    y = base(x)
    if target == "table":
        rows, base_rows = F.one_hot(x, VOCABULARY).float(), y
    else:
        rows = F.unfold(_flat_plane(base, x), _kernel(base), stride=_stride(base)).transpose(1, 2)
        base_rows = y.flatten(2).transpose(1, 2)
    out = functional.flipout_lora(
        rows,
        item.mean.flatten(1),
        item.rho.flatten(1),
        b_of(model).flatten(1),
        base_rows,
        scaling=1.5,
        stream=item.variant.stream,
        **options,
    )
    return out if target == "table" else out.transpose(1, 2).reshape(y.shape)


def _flat_plane(base: Any, x: Tensor) -> Tensor:
    """x padded, as an image: a line is an image of height 1."""
    if x.dim() == 4:
        return x
    return F.pad(x, (base.padding[0],) * 2)[:, :, None]


def _kernel(base: Any) -> tuple[int, ...]:
    return tuple(base.kernel_size) if len(base.kernel_size) == 2 else (1, *base.kernel_size)


def _stride(base: Any) -> tuple[int, ...]:
    return tuple(base.stride) if len(base.stride) == 2 else (1, *base.stride)


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("scope", ["token", "example", "none"])
def test_training_noise_is_that_of_the_op(target: str, scope: str) -> None:
    model = adapted(target, scope=scope)
    layer, x = layer_of(model), inputs_of(target)
    with posterior(model, "flipout", seed=3) as state:
        key = state.key_on(torch.device("cpu"))
        found = layer(x)
        close(found, as_op(model, x, target, key=key, scope=scope))
        if target == "plane":
            close(layer(x[0]), layer(x[:1])[0])
    again = layer(x)
    assert (found - again).abs().max() > 0.05


@pytest.mark.parametrize("target", KINDS)
@torch.no_grad()
def test_prediction_by_other_laws_is_that_of_the_op(target: str) -> None:
    model = adapted(target)
    layer, x = layer_of(model), inputs_of(target)
    ids = torch.tensor([3, 0, 3, 8, 1, 0])
    with posterior(model, draws=ids, seed=7, kind="shared") as state:
        groups = ids[:, None]
        close(layer(x), as_op(model, x, target, key=state.key_on(ids.device), groups=groups))
    with posterior(model, n_samples=2, seed=7, scope="token"):
        found = layer(x)
    for draw in (0, 1):
        key = random.fold_in(random.key(7), draw)
        part = x[3 * draw : 3 * draw + 3]
        close(found[3 * draw : 3 * draw + 3], as_op(model, part, target, key=key, scope="token"))


@pytest.mark.parametrize("target", KINDS)
def test_gradients(target: str) -> None:
    """Those of the op on explicit inputs; the padding token has none, as in the base layer."""
    model = adapted(target)
    layer, x = layer_of(model), inputs_of(target)
    item = bayes_layers(model)[0]
    parameters = [item.mean, item.rho, b_of(model)]
    with posterior(model, "flipout", seed=3) as state:
        weights = torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(4))
        found = torch.autograd.grad((layer(x) * weights).sum(), parameters)
        op = as_op(model, x, target, key=state.key_on(torch.device("cpu")))
        expected = torch.autograd.grad((op * weights).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        kept = torch.ones_like(one, dtype=torch.bool)
        if target == "table" and one.shape[-1] == VOCABULARY:
            assert not one[:, 2].any()
            kept[:, 2] = False
        torch.testing.assert_close(one[kept], other[kept], rtol=1e-4, atol=1e-4)
        assert one.abs().max() > 0


@pytest.mark.parametrize("target", ["line", "plane"])
def test_dropout_is_that_of_the_input(target: str) -> None:
    """As in PEFT: an element of the input is dropped in all patches that see it."""
    model = adapted(target, lora_dropout=0.5, scope="none").train()
    layer, x = layer_of(model), inputs_of(target)
    with torch.no_grad():
        layer.lora_A_rho["default"].zero_()
    with posterior(model, "flipout", seed=3) as state:
        key = state.key_on(torch.device("cpu"))
        rows = x.numel() // x.shape[-1]
        stream = bayes_layers(model)[0].variant.stream
        keep = random.dropout_mask(key, rows, x.shape[-1], 0.5, stream=stream).reshape(x.shape)
        base = layer.get_base_layer()
        plain = layer.lora_B["default"](layer.lora_A["default"](x * keep / 0.5))
        close(layer(x), base(x) + 1.5 * plain)


@pytest.mark.parametrize("padding", ["same", "valid", 0, 2])
def test_patches_of_other_paddings(padding: Any) -> None:
    conv = nn.Conv2d(2, 3, (3, 2), padding=padding, bias=False)
    x = torch.randn(2, 2, 6, 5, generator=torch.Generator().manual_seed(1))
    found = patches(conv, x) @ conv.weight.flatten(1).T
    close(found.transpose(1, 2).reshape(conv(x).shape), conv(x))


# --- divergence and training ----------------------------------------------------------------------


@pytest.mark.parametrize("target", KINDS)
def test_divergence(target: str) -> None:
    model = adapted(target, prior_std=0.3, kl_schedule="constant")
    item = bayes_layers(model)[0]
    mean, std = item.mean.detach().double(), item.rho.detach().double().square()
    expected = (0.3 / std).log() + (std**2 + mean**2) / (2 * 0.3**2) - 0.5
    kl = kl_divergence(model)
    torch.testing.assert_close(kl.double(), expected.sum(), rtol=1e-5, atol=1e-5)
    kl.backward()
    torch.testing.assert_close(item.mean.grad, item.mean.detach() / 0.3**2)
    before = float(kl)
    step: Any = decoupled_kl(model, n_train=20, batch_size=2, learning_rate=0.1, factor_sum=100.0)
    step.step()
    assert float(kl_divergence(model)) < before


def test_prior_of_a_layer_follows_the_norm_of_its_inputs() -> None:
    model = adapted(list(KINDS), prior_rule="fan_in", prior_std=0.5)
    found = {item.name: item.variant.prior_std for item in bayes_layers(model)}
    assert found == {"table": 0.5, "line": 0.5 / 24**0.5, "plane": 0.5 / 18**0.5}


def test_an_embedding_begins_without_an_update() -> None:
    """A from U(-1, 1) and B = 0, so that the first draws are the base model; twice the same."""
    torch.manual_seed(4)
    model = get_peft_model(Net(), BlobConfig(target_modules=["table"], r=4))
    item = bayes_layers(model)[0]
    a, b = item.mean.detach(), b_of(model)
    assert not b.any() and a.abs().max() <= 1
    assert abs(float(a.square().mean()) - 1 / 3) < 0.05 and abs(float(a.mean())) < 0.1
    with posterior(model, n_samples=2), torch.no_grad():
        assert torch.equal(model(IDS), Net().eval()(IDS))


def test_training_learns_and_saves(tmp_path: Path) -> None:
    model = get_peft_model(Net(), BlobConfig(target_modules=[*KINDS, "head"], r=4)).train()
    labels = IDS[:, 0] % 3
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(IDS), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]
    model.eval()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(Net(), tmp_path).eval()
    kept = dict(loaded.named_parameters())
    for name, value in model.named_parameters():
        assert torch.equal(kept[name], value), name
    for number in (0, 5):
        with torch.no_grad(), posterior(model, first_sample=number, seed=9):
            expected = model(IDS)
        with torch.no_grad(), posterior(loaded, first_sample=number, seed=9):
            assert torch.equal(loaded(IDS), expected)
        export_lora(model, tmp_path / "draw", number, seed=9)
        plain = PeftModel.from_pretrained(Net(), tmp_path / "draw").eval()
        with torch.no_grad():
            close(plain(IDS), expected)


@pytest.mark.parametrize("safe", [False, True])
@torch.no_grad()
def test_merging(safe: bool) -> None:
    model = adapted([*KINDS, "head"])
    mean, plain = model(IDS), dict(Net().named_parameters())
    model.merge_adapter(safe_merge=safe)
    close(model(IDS), mean)
    for target in KINDS:
        layer: Any = model.get_base_model().get_submodule(target)
        changed = layer.get_base_layer().weight - plain[f"{target}.weight"]
        close(changed, layer.get_delta_weight("default"))
    model.unmerge_adapter()
    close(model(IDS), mean)
    merged: Any = model.merge_and_unload(safe_merge=safe)
    close(merged(IDS), mean)
    assert not any("lora" in name for name, _ in merged.named_modules())


@pytest.mark.parametrize("target", KINDS)
def test_plain_lora_becomes_the_mean(target: str, tmp_path: Path) -> None:
    plain = adapted([target, "head"], LoraConfig)
    plain.save_pretrained(str(tmp_path))
    model = import_lora(Net(), tmp_path, method="blob").eval()
    with torch.no_grad():
        close(model(IDS), plain(IDS))
        with posterior(model, seed=1):
            assert (model(IDS) - plain(IDS)).abs().max() > 1e-5


@pytest.mark.parametrize("target", KINDS)
@torch.no_grad()
def test_tfb_keeps_the_mean_and_finds_noise(target: str) -> None:
    model = adapted([target, "head"], LoraConfig, Classifier())
    before = model(input_ids=IDS).logits
    data = [{"input_ids": IDS, "labels": before.argmax(1)}]
    report: Any = bayesianize(model, "tfb", data, progress=False, tolerance=0.5, high=5.0)
    close(model(input_ids=IDS).logits, before)
    assert report.sigma > 0 and report.layers == 2
    first = next(item for item in bayes_layers(model) if item.name == target)
    assert first.tensor("lora_A_sigma").shape == (4, 1)
    with posterior(model, draws=range(6), seed=1):
        assert (model(input_ids=IDS).logits - before).abs().max() > 1e-3
    found: Any = predict(model, {"input_ids": IDS}, n_samples=4)
    assert found.log_probs.shape == (6, 3) and found.mutual_information.max() > 1e-4


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "target", "options", "said"),
    [
        (PolarConfig, "table", {}, "no form for embeddings"),
        (PolarConfig, "line", {}, "no form for convolutions"),
        (ScalablConfig, "table", {}, "no form for embeddings"),
        (BlobConfig, "line", {"groups": 2}, "in 2 groups is no product"),
        (
            BlobConfig,
            "line",
            {"dilation": 2, "padding": 2},
            r"no dilation, and the layer has \(2,\)",
        ),
        (BlobConfig, "line", {"padding_mode": "reflect", "padding": 1}, "pads with zeros"),
        (ScalablConfig, "line", {"padding_mode": "circular", "padding": 1}, "pads with zeros"),
    ],
)
def test_what_cannot_be_is_refused(config: Any, target: str, options: Any, said: str) -> None:
    base = Net(**options)
    before = fingerprint(base)
    with pytest.raises(ValueError, match=f"target {target} .* cannot carry .*{said}"):
        get_peft_model(base, config(target_modules=["head", target], r=2))
    assert fingerprint(base) == before


def test_embeddings_that_rescale_themselves_are_refused() -> None:
    base = Net()
    base.table.max_norm = 1.0
    with pytest.raises(ValueError, match="max_norm rescales its weights"):
        get_peft_model(base, BlobConfig(target_modules=["table"]))


def test_embeddings_of_positions_have_one_row() -> None:
    """GPT-2 looks up positions once for all rows, which then cannot have draws of their own."""
    model = get_peft_model(
        gpt2(pad_token_id=0), BlobConfig(target_modules=["wte"], task_type="SEQ_CLS", r=2)
    )
    ids = IDS.clamp(3, 63)
    with torch.no_grad(), posterior(model, n_samples=2):
        assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape == (6, 3)
    model = get_peft_model(
        gpt2(pad_token_id=0), BlobConfig(target_modules=["wpe"], task_type="SEQ_CLS", r=2)
    )
    with pytest.raises(ValueError, match=r"wpe looks up \(1, 5\) for all rows at once"):
        with posterior(model, n_samples=2):
            model(**fold_samples({"input_ids": ids[:3]}, 2))


@pytest.mark.parametrize("where", [[0, 1], [1]])
def test_draws_of_a_language_model(where: list[int], tmp_path: Path) -> None:
    """Draws differ below all layers of the stack: nothing is shared, and texts that are written agree."""
    names = ["embed_tokens", *[f"layers.{i}.self_attn.q_proj" for i in where]]
    model = adapted(names, base=llama(initializer_range=0.1), task_type="CAUSAL_LM", lora_alpha=4)
    ids = IDS.clamp(3, 63)
    options: dict[str, Any] = {"choices": [5, 6, 7], "n_samples": 4, "return_samples": True}
    found: Any = predict(model, {"input_ids": ids}, **options)
    for number in range(4):
        with torch.no_grad(), posterior(model, first_sample=number):
            one = model(input_ids=ids).logits[:, -1, [5, 6, 7]].double().log_softmax(-1)
        torch.testing.assert_close(
            found.sample_log_probs[number].double(), one, rtol=1e-4, atol=1e-5
        )
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad(), posterior(model, n_samples=2):
        texts = [
            model.generate(input_ids=ids[:2].repeat(2, 1), use_cache=cached, **options)
            for cached in (True, False)
        ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_of_a_language_model_through_files(tied: bool, tmp_path: Path) -> None:
    """PEFT writes the base embedding beside its adapter; all readers take the folder."""

    def base() -> Any:
        return llama(initializer_range=0.1, tie_word_embeddings=tied)

    base().save_pretrained(str(tmp_path / "base"))
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(["embed_tokens", "q_proj"], base=start, task_type="CAUSAL_LM")
    ids = IDS.clamp(3, 63)
    model.save_pretrained(str(tmp_path / "own"))
    model.save_pretrained(str(tmp_path / "lean"), save_embedding_layers=False)
    export_lora(model, tmp_path / "mean")
    mean = logits(model, ids)
    readers: list[Any] = [
        PeftModel.from_pretrained(base(), str(tmp_path / "own")),
        PeftModel.from_pretrained(base(), str(tmp_path / "lean")),
        PeftModel.from_pretrained(base(), str(tmp_path / "mean")),
        AutoModelForCausalLM.from_pretrained(tmp_path / "own"),
        read_lora(base(), tmp_path / "own"),
        read_lora(base(), tmp_path / "mean"),
        import_lora(base(), tmp_path / "mean", method="blob"),
    ]
    for other in readers:
        torch.testing.assert_close(logits(other.eval(), ids), mean, rtol=1e-5, atol=1e-5)
    with posterior(model, n_samples=2, seed=3):
        drawn = logits(model, ids)
    for other in (readers[0], readers[1], readers[3], readers[4]):
        with posterior(other, n_samples=2, seed=3):
            torch.testing.assert_close(logits(other, ids), drawn, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("table", "layer table cannot have a posterior: it is an embedding"),
        ("line", r"layer line cannot have a posterior: it is no product of two linear .*Conv1d"),
    ],
)
def test_laplace_says_what_it_cannot(target: str, said: str) -> None:
    model = adapted([target, "head"], LoraConfig, Classifier())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    data = [{"input_ids": IDS, "labels": IDS[:, 0] % 3}]
    with pytest.raises(ValueError, match=said):
        bayesianize(model, "laplace", data, progress=False)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_biases_of_relative_positions_are_shared_by_all_rows() -> None:
    """T5 looks up a bias for each pair of positions: rows of the table's input are no examples."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1}
    config = transformers.T5Config(**sizes, num_heads=2, num_labels=3, decoder_start_token_id=0)
    base = transformers.T5ForSequenceClassification(config).eval()
    model = adapted(["relative_attention_bias"], base=base, task_type="SEQ_CLS")
    ids = IDS.clamp(3, 31)[:4]
    ids[:, -1] = config.eos_token_id
    # Two draws and an even number of positions, which could be split between them.
    ids = torch.cat([ids, ids], 1)[:, -4:]
    with torch.no_grad(), posterior(model, draws=[0, 1, 0, 1]):
        with pytest.raises(ValueError, match="shared rows, so that 4 draws cannot be folded"):
            model(input_ids=ids)
    found = predict(model, {"input_ids": ids}, n_samples=2, seed=1)
    alone = []
    for number in range(2):
        with torch.no_grad(), posterior(model, first_sample=number, seed=1):
            alone.append(model(input_ids=ids).logits.softmax(-1))
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    torch.testing.assert_close(
        found.probs.float(), torch.stack(alone).mean(0), rtol=1e-4, atol=1e-6
    )


def test_weights_that_are_tied_have_one_posterior_each() -> None:
    with pytest.raises(ValueError, match="ensure_weight_tying cannot be combined"):
        BlobConfig(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)


class Scaled(nn.Embedding):
    """An embedding that scales what it looks up, as Gemma's do."""

    embed_scale = 3.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


@torch.no_grad()
def test_embeddings_with_a_scale() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(Scaled(VOCABULARY, 8))
    before = copy.deepcopy(base[0])
    model = adapted("0", base=base)
    item = bayes_layers(model)[0]
    for number in (None, 1):
        a, b = item.factors(number, 7)
        changed: Any = copy.deepcopy(before)
        changed.weight += 1.5 * (b @ a).T
        with posterior(
            model, "mean" if number is None else "sample", seed=7, first_sample=number or 0
        ):
            close(model(IDS), changed(IDS))


@torch.no_grad()
def test_compiled() -> None:
    """One graph for a lookup and a convolution, with the draws of each pass."""
    model = adapted(["table", "line"])
    table, line = (layer for layer in model.get_base_model().children() if hasattr(layer, "r"))

    def both(ids: Tensor) -> Tensor:
        return line(table(ids).transpose(1, 2))

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for seed in (1, 2):
        with posterior(model, draws=[seed, 5, 5, 1, 0, 9], seed=seed):
            close(compiled(IDS), both(IDS))
