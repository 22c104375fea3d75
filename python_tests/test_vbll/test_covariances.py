"""Covariances of weight rows: packed triangles, moments, gradients by hand, memory."""

from __future__ import annotations

import copy

import pytest
import torch
from accuracy import assert_no_worse_than_torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bayes_kernels.vbll import VBLLClassification, pack_tril, unpack_tril
from test_vbll.heads import COVARIANCES, batch, head, jensen, plain_moments


def test_packed_layout_is_rows_of_the_lower_triangle():
    square = torch.arange(25.0).reshape(5, 5)
    packed = pack_tril(square)
    for i in range(5):
        for j in range(i + 1):
            assert packed[i * (i + 1) // 2 + j] == square[i, j]
    torch.testing.assert_close(unpack_tril(packed), square.tril())
    many = torch.randn(3, 2, 7, 7)
    torch.testing.assert_close(unpack_tril(pack_tril(many)), many.tril())
    for bad in (torch.ones(3, 4), torch.ones(4)):
        with pytest.raises(ValueError, match="pack_tril: square must have shape"):
            pack_tril(bad)
    with pytest.raises(ValueError, match="unpack_tril: packed must have shape"):
        unpack_tril(torch.ones(2, 5))


def test_no_full_square_is_stored():
    layer = VBLLClassification(40, 3)
    assert layer.scale_tril.shape == (3, 40 * 41 // 2)
    assert max(p.numel() for p in layer.parameters()) == 3 * 40 * 41 // 2


@pytest.mark.parametrize("d", [1, 2, 127, 128, 129, 300])
def test_dense_blocks_of_columns(d):
    layer = head("dense", d=d, classes=2)
    features, labels = batch(3, d, 2)
    features.requires_grad_()
    parameters = [features, *layer.parameters()]
    mean, variance = plain_moments(layer, features)
    truth = torch.autograd.grad(jensen(mean, variance, labels).sum() * 1.7, parameters)
    ours = torch.autograd.grad(layer.bound(features, labels).sum() * 1.7, parameters)
    for a, t in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, t)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_gradients_are_no_worse_than_torch_in_fp32(covariance):
    layer = head(covariance, d=64)
    features, labels = batch(12, 64)

    def gradients(ours: bool, dtype):
        one = copy.deepcopy(layer).to(dtype)
        x = features.to(dtype).requires_grad_()
        value = one.bound(x, labels) if ours else jensen(*plain_moments(one, x), labels)
        return torch.autograd.grad(value.mean(), [x, *one.parameters()])

    names = ["features", *dict(layer.named_parameters())]
    for name, ours, same, truth in zip(
        names,
        gradients(True, torch.float32),
        gradients(False, torch.float32),
        gradients(False, torch.float64),
        strict=True,
    ):
        assert_no_worse_than_torch(ours, same, truth, what=name)


def test_the_covariances_agree_when_they_are_the_same_matrix():
    diagonal, features = head("diagonal"), batch()[0]
    labels = batch()[1]
    dense, low_rank = head("dense"), head("low_rank")
    values = []
    with torch.no_grad():
        for other in (dense, low_rank):
            other.weight_mean.copy_(diagonal.weight_mean)
            other.noise_log_scale.copy_(diagonal.noise_log_scale)
        dense.scale_tril.copy_(pack_tril(torch.diag_embed(diagonal.log_scale)))
        low_rank.log_scale.copy_(diagonal.log_scale)
        low_rank.factor.zero_()
    for layer in (diagonal, dense, low_rank):
        values.append((layer.bound(features, labels), layer.kl(), layer.loss(features, labels, 30)))
    # And a low-rank matrix as a dense one.
    low_rank, dense = head("low_rank"), head("dense")
    with torch.no_grad():
        dense.weight_mean.copy_(low_rank.weight_mean)
        dense.noise_log_scale.copy_(low_rank.noise_log_scale)
        root = torch.linalg.cholesky(low_rank.covariance_matrix())
        root.diagonal(dim1=1, dim2=2).log_()
        dense.scale_tril.copy_(pack_tril(root))
    pair = [
        (layer.bound(features, labels), layer.kl(), layer.loss(features, labels, 30))
        for layer in (low_rank, dense)
    ]
    for first, second in ((values[0], values[1]), (values[0], values[2]), pair):
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest result of any operation."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_no_tensor_of_rows_by_classes_by_features(covariance):
    rows, classes, d = 400, 5, 48
    layer = head(covariance, d=d, classes=classes, dtype=torch.float32)
    features, labels = batch(rows, d, classes, torch.float32)
    features.requires_grad_()
    own = {p.untyped_storage().data_ptr() for p in (features, *layer.parameters())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), LargestTensor() as seen:
        layer.loss(features, labels, 1000).backward()
    assert seen.largest < rows * classes * d / 2
    # Labels, two flags and a few fp32 numbers for each logit; projections where of low rank.
    per_logit = 4 * 4 + (4 * layer.rank)
    assert sum(kept.values()) <= rows * (classes * per_logit + 32) + 4096


def test_same_bits_for_any_number_of_threads():
    layer = head("dense", d=200, dtype=torch.float32)
    features, labels = batch(16, 200, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            loss = layer.loss(features, labels, 10)
            results.append([loss.detach(), *torch.autograd.grad(loss, list(layer.parameters()))])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
