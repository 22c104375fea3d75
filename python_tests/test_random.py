"""The noise contract: known answers, agreement with its Python definition, statistics at fixed keys."""

from __future__ import annotations

import math

import pytest
import torch

from bayes_kernels import random, reference

scipy_stats = pytest.importorskip("scipy.stats")


def core():
    return pytest.importorskip("bayes_kernels._core_tests", reason="core test module is not built")


# --- core/philox.h, on its own ------------------------------------------------------------------


def test_philox_known_answer():
    # Random123's known-answer file: philox4x32-10, counter 0, key 0.
    assert core().philox(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 2**32 - 1, 2**64 - 1])
def test_philox_header_equals_python(seed: int, offset: int):
    signed = [v - 2**64 if v >= 2**63 else v for v in (seed, offset)]
    words = reference.philox(torch.tensor(signed), torch.tensor([0, 1, 2**40]))
    assert [core().philox(seed, offset, i) for i in (0, 1, 2**40)] == words.tolist()


def test_uniform_is_never_zero_and_at_most_one():
    assert core().uniform(0) == 2.0**-33
    assert core().uniform(0xFFFFFFFF) == 1.0


def test_log_is_accurate_to_two_ulp():
    words = torch.randint(0, 2**32, (20000,), generator=torch.Generator().manual_seed(0)).tolist()
    for word in [0, 1, 2, 2**31, 2**32 - 1, 2**32 - 200, *words]:
        u = core().uniform(word)
        exact = math.log(u)
        ulp = 2.0**-23 * max(abs(exact), 2.0**-24)
        assert abs(core().log_unit(u) - exact) <= 2 * ulp, word


def test_turn_is_accurate_on_every_octant():
    for i in range(0, 4097):
        u = float(torch.tensor(i / 4096, dtype=torch.float32))
        c, s = core().cos_sin_turn(u)
        assert abs(c - math.cos(2 * math.pi * u)) < 1.2e-7
        assert abs(s - math.sin(2 * math.pi * u)) < 1.2e-7


# --- ops against the definition -----------------------------------------------------------------

KEYS = [0, 7, -1, 2**63 - 1]


@pytest.mark.parametrize("seed", KEYS)
def test_fold_in(device, seed: int):
    key = random.key(seed, device.torch)
    for data in (0, 1, 8 * 12345 + 3, 2**64 - 1):
        assert torch.equal(random.fold_in(key, data).cpu(), reference.fold_in(key.cpu(), data))


def test_fold_in_gives_the_offset_a_carry():
    key = torch.tensor([5, -1])  # offset 2^64 - 1: block 1 wraps to counter 0
    assert torch.equal(random.fold_in(key, 1), reference.fold_in(torch.tensor([5, 0]), 0))


@pytest.mark.parametrize("shape", [(1,), (3, 5), (8, 130), (0, 4)])
def test_normal_matches_definition(device, shape: tuple[int, ...]):
    key = random.fold_in(random.key(3, device.torch), 9)
    ours = random.normal(key, shape, stream=11).cpu()
    exact = reference.normal(key.cpu(), shape, stream=11)
    torch.testing.assert_close(ours, exact, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize("columns", [1, 31, 128, 129, 300])
def test_signs_match_definition(device, columns: int, output: bool):
    key = random.key(1, device.torch)
    ours = random.sign_bits(key, 7, columns, stream=2, output=output, row0=5, rows_per_id=3)
    exact = reference.sign_bits(
        key.cpu(), 7, columns, stream=2, output=output, row0=5, rows_per_id=3
    )
    assert torch.equal(ours.cpu(), exact)
    ids = torch.tensor([4, 0, 4, 2**40, 1, 9, 3], device=device.torch)
    ours = random.sign_bits(key, 7, columns, stream=2, output=output, ids=ids)
    assert torch.equal(
        ours.cpu(),
        reference.sign_bits(key.cpu(), 7, columns, stream=2, output=output, ids=ids.cpu()),
    )
    assert torch.equal(ours[0], ours[2])


@pytest.mark.parametrize("columns", [1, 8, 37])
def test_dropout_mask_matches_definition(device, columns: int):
    key = random.key(1, device.torch)
    ours = random.dropout_mask(key, 6, columns, 0.3, stream=4, row0=2)
    assert torch.equal(
        ours.cpu(), reference.dropout_mask(key.cpu(), 6, columns, 0.3, stream=4, row0=2)
    )
    assert random.dropout_mask(key, 6, columns, 0.0).all()


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 1), (0, 130), (3, 0)])
def test_nothing_has_the_shape_of_its_definition(device, rows: int, columns: int):
    key, ids = random.key(1, device.torch), torch.arange(rows, device=device.torch)
    for output, given in ((False, None), (True, ids)):
        ours = random.sign_bits(key, rows, columns, output=output, ids=given)
        exact = reference.sign_bits(key, rows, columns, output=output, ids=given)
        assert ours.shape == exact.shape == (rows, columns) and ours.dtype == exact.dtype
    ours = random.dropout_mask(key, rows, columns, 0.3)
    exact = reference.dropout_mask(key, rows, columns, 0.3)
    assert ours.shape == exact.shape == (rows, columns) and ours.dtype == exact.dtype
    noise = reference.dense_noise(key, rows, columns, 4, dropout=0.3)
    assert noise.eps.shape == (4, columns) and noise.r_out.shape == (rows, 4)


def test_torch_stateless_generator_is_an_oracle():
    """fold_in and normals are laid out as in torch.func._random, where this torch has it."""
    oracle = pytest.importorskip(
        "torch.func._random", reason="torch has no stateless generator yet"
    )
    theirs = oracle.key(7)
    try:
        oracle.fold_in(theirs, 5)
    except NotImplementedError:
        pytest.skip("this torch has no stateless generator on the CPU (2.14 has)")
    ours = random.key(7)
    assert theirs.to(torch.int64).tolist() == ours.tolist()
    theirs = oracle.fold_in(theirs, 5)
    assert theirs.to(torch.int64).tolist() == random.fold_in(ours, 5).tolist()
    # The op folds in its stream and purpose: give torch the folded key.
    sub = oracle.fold_in(oracle.key(7), 8 * 3)
    torch.testing.assert_close(
        random.normal(ours, (6, 50), stream=3), oracle.normal(sub, (6, 50)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63, 2**64 - 5, (1 << 70) + 3])
def test_keys_are_the_same_on_every_device(device, seed: int):
    made = random.key(seed, device.torch)
    assert made.device.type == device.torch.type and made.dtype == torch.int64
    wrapped = seed % 2**64
    assert made.tolist() == [wrapped - 2**64 if wrapped >= 2**63 else wrapped, 0]


def test_the_stream_of_a_layer_never_changes():
    """Adapters are stored with their names: other numbers would be other draws."""
    assert random.layer_stream("model.layers.0.self_attn.q_proj") == 362493369735
    names = [f"model.layers.{i}.{part}" for i in range(64) for part in ("q", "k", "v", "o")]
    assert len({random.layer_stream(name) for name in names}) == 256


def test_split_gives_distinct_keys():
    keys = {tuple(k.tolist()) for k in random.split(random.key(0), 100)}
    assert len(keys) == 100


def test_results_do_not_depend_on_the_number_of_threads():
    key = random.key(4)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append((random.normal(key, (1000, 37)), random.sign_bits(key, 300, 200)))
    finally:
        torch.set_num_threads(before)
    for normals, signs in results[1:]:
        assert torch.equal(normals, results[0][0])
        assert torch.equal(signs, results[0][1])


# --- statistics at fixed keys -------------------------------------------------------------------

COUNT = 1_000_000


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    return random.normal(random.key(2024), (COUNT,), stream=1).double()


def test_moments(sample: torch.Tensor):
    # Standard errors: 1/sqrt(n), sqrt(2/n), sqrt(15/n), sqrt(96/n); bounds are four of them.
    n = math.sqrt(COUNT)
    assert abs(sample.mean()) < 4 / n
    assert abs((sample**2).mean() - 1) < 4 * math.sqrt(2) / n
    assert abs((sample**3).mean()) < 4 * math.sqrt(15) / n
    assert abs((sample**4).mean() - 3) < 4 * math.sqrt(96) / n


@pytest.mark.parametrize("stream", [0, 1, 64])
def test_kolmogorov_smirnov(stream: int):
    values = random.normal(random.key(5), (COUNT,), stream=stream).double().numpy()
    assert scipy_stats.kstest(values, "norm").pvalue > 1e-3


def test_neighbours_and_streams_are_uncorrelated(sample: torch.Tensor):
    other_stream = random.normal(random.key(2024), (COUNT,), stream=2).double()
    other_key = random.normal(random.key(2025), (COUNT,), stream=1).double()
    bound = 4 / math.sqrt(COUNT)
    for other in (other_stream, other_key, sample.roll(1), sample.roll(2), sample.roll(4)):
        assert abs((sample * other).mean()) < bound
        assert abs(((sample**2 - 1) * (other**2 - 1)).mean()) < 2 * bound


def test_sign_bits_are_balanced_at_every_position():
    rows = 20000
    signs = random.sign_bits(random.key(1), rows, 256).double()
    # 256 positions: the largest of so many standard normals stays below 4.5.
    assert (signs.mean(0).abs() < 4.5 / math.sqrt(rows)).all()
    centred = signs - signs.mean(0)
    correlation = centred.T @ centred / rows - torch.eye(256)
    assert correlation.abs().max() < 5.5 / math.sqrt(rows)


def test_signs_of_input_and_rank_side_are_independent():
    key = random.key(1)
    a = random.sign_bits(key, 5000, 64).double()
    b = random.sign_bits(key, 5000, 64, output=True).double()
    assert abs((a * b).mean()) < 4 / math.sqrt(5000 * 64)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_dropout_rate(p: float):
    keep = random.dropout_mask(random.key(3), 2000, 500, p)
    bound = 4 * math.sqrt(p * (1 - p) / keep.numel()) + 1 / 65536
    assert abs((~keep).double().mean() - p) < bound


# --- errors -------------------------------------------------------------------------------------


def test_errors_name_argument_and_remedy():
    with pytest.raises(TypeError, match="seed must be an int"):
        random.key(1.5)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"key must be an int64 tensor of two elements.*random.key"
    ):
        random.normal(torch.zeros(2), (3,))
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\)"):
        random.dropout_mask(random.key(0), 1, 1, 1.0)
