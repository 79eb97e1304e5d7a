import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from attnlab.errors import InputError
from attnlab.generation import SamplingParams, filter_logits, sample
from attnlab.generation import row_keys as eager_row_keys

jit_filter, jit_sample, row_keys = jax.jit(filter_logits), jax.jit(sample), jax.jit(eager_row_keys)

# Logits on a coarse grid, so that ties are common; -inf for tokens suppressed by the caller.
entry = st.one_of(st.integers(-16, 16).map(lambda n: n / 4), st.just(-np.inf))
rows = st.lists(entry, min_size=9, max_size=9).filter(lambda row: max(row) > -np.inf)


def samplings(optional=lambda strategy: st.one_of(st.none(), strategy)):
    return st.builds(
        SamplingParams,
        temperature=st.floats(0.1, 5),
        top_k=optional(st.integers(1, 12)),
        top_p=optional(st.floats(0.01, 1)),
        min_p=optional(st.floats(0, 1)),
    )


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def oracle(row, sampling):
    """Return float64 probabilities after filtering without a sort; reject borderline cases."""
    logits = np.asarray(row, np.float64) / sampling.temperature
    if sampling.top_k is not None:
        level = sorted(logits)[-min(sampling.top_k, len(logits))]
        logits = np.array([x if x >= level else -np.inf for x in logits])
    if sampling.top_p is not None:
        p = softmax(logits)
        before = np.array([p[logits > x].sum() for x in logits])
        assume(np.abs(before[p > 0] - sampling.top_p).min() > 1e-5)
        logits = np.where(before < sampling.top_p, logits, -np.inf)
    if sampling.min_p is not None:
        relative = np.exp(logits - logits.max())
        at_border = np.abs(relative / max(sampling.min_p, 1e-30) - 1) < 1e-5
        assume(not np.any(at_border & (relative < 1)))
        logits = np.where(relative >= sampling.min_p, logits, -np.inf)
    return softmax(logits)


@settings(max_examples=300, deadline=None)
@given(rows, samplings())
def test_filters_match_oracle(row, sampling):
    expected = oracle(row, sampling)
    got = np.asarray(jit_filter(jnp.array([row]), sampling))[0]
    np.testing.assert_array_equal(got > -np.inf, expected > 0)
    np.testing.assert_allclose(softmax(got), expected, atol=1e-5)
    assert got.max() == 0


@settings(max_examples=100, deadline=None)
@given(rows, samplings(), st.randoms(use_true_random=False))
def test_filters_are_permutation_equivariant(row, sampling, random):
    permutation = random.sample(range(len(row)), len(row))
    kept = jit_filter(jnp.array([row]), sampling)[0]
    # Probabilities are summed in sorted order, so permuting the vocabulary changes no bit.
    np.testing.assert_array_equal(
        kept[jnp.array(permutation)], jit_filter(jnp.array([row])[:, jnp.array(permutation)], sampling)[0]
    )


@settings(max_examples=100, deadline=None)
@given(rows, samplings(), st.integers(0, 2**31 - 1))
def test_samples_pass_filters_and_argmax_is_kept(row, sampling, seed):
    kept = np.asarray(jit_filter(jnp.array([row]), sampling))[0]
    assert kept[np.argmax(row)] == 0
    drawn = jit_sample(row_keys(jax.random.key(seed), jnp.arange(1)), jnp.array([row]), sampling)
    assert kept[int(drawn[0])] > -np.inf


def test_filters_match_manual_examples():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125]]))

    def kept(**filters):
        return (filter_logits(logits, SamplingParams(**filters))[0] > -jnp.inf).tolist()

    assert kept() == [True, True, True, True]
    assert kept(top_k=1) == [True, False, False, False]
    assert kept(top_k=3) == [True, True, True, True]  # the fourth equals the third
    assert kept(top_k=99) == [True, True, True, True]
    assert kept(top_p=1e-9) == [True, False, False, False]
    assert kept(top_p=0.51) == [True, True, False, False]
    assert kept(top_k=2, top_p=0.6) == [True, False, False, False]  # 0.5 is 2/3 of the top-2 mass
    assert kept(min_p=0.3) == [True, True, False, False]
    assert kept(min_p=1.0) == [True, False, False, False]


def test_top_p_one_keeps_negligible_probabilities():
    kept = filter_logits(jnp.array([[0.0, -30.0, -200.0]]), SamplingParams(top_p=1.0))
    np.testing.assert_allclose(kept, [[0.0, -30.0, -200.0]])


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(1.5, 6, 0.9, 0.05)])
def test_samples_follow_distribution(sampling):
    logits, draws = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.0]), 20_000
    probabilities = softmax(np.asarray(filter_logits(jnp.array([logits]), sampling), np.float64)[0])
    keys = row_keys(jax.random.key(0), jnp.arange(draws))
    ids = jit_sample(keys, jnp.broadcast_to(jnp.array(logits), (draws, 8)), sampling)
    counts, possible = np.bincount(ids, minlength=8), probabilities > 0
    assert counts[~possible].sum() == 0
    assert scipy.stats.chisquare(counts[possible], draws * probabilities[possible]).pvalue > 0.01


def test_temperature_zero_takes_first_argmax():
    logits = jnp.array([[1.0, 3.0, 3.0, 2.0], [-jnp.inf, -5.0, -6.0, -5.0]])
    greedy = SamplingParams(temperature=0.0, top_k=3, top_p=0.9, min_p=0.1)
    for seed in range(5):
        assert jit_sample(row_keys(jax.random.key(seed), jnp.arange(2)), logits, greedy).tolist() == [1, 1]
    np.testing.assert_array_equal(jnp.isfinite(filter_logits(logits, greedy)).sum(-1), [1, 1])


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_extreme_temperatures_give_no_nan(temperature):
    kept = filter_logits(jnp.array([[1e4, -1e4, 9e3]]), SamplingParams(temperature, 2, 0.9, 0.1))
    assert not jnp.isnan(kept).any() and kept.max() == 0


def test_half_precision_logits_are_filtered_in_float32():
    logits = jnp.array([[1.0, 2.0, 3.0]], jnp.bfloat16)
    assert filter_logits(logits, SamplingParams(top_p=0.9)).dtype == jnp.float32


def test_samples_do_not_depend_on_other_rows():
    logits, key = jax.random.normal(jax.random.key(1), (8, 100)), jax.random.key(2)
    row_numbers = jnp.arange(8)
    batched = jit_sample(row_keys(key, row_numbers), logits, SamplingParams(top_p=0.95))
    backwards = jit_sample(row_keys(key, row_numbers[::-1]), logits[::-1], SamplingParams(top_p=0.95))
    single = jit_sample(row_keys(key, row_numbers[5:6]), logits[5:6], SamplingParams(top_p=0.95))
    np.testing.assert_array_equal(batched, backwards[::-1])
    assert batched[5] == single[0]
    same = jit_sample(row_keys(key, row_numbers), jnp.zeros((8, 100)), SamplingParams())
    assert len(set(same.tolist())) > 4, "equal rows must have different samples"


def test_parameters_may_be_traced():
    jit = jax.jit(lambda logits, sampling: filter_logits(logits, sampling))
    logits = jax.random.normal(jax.random.key(0), (2, 20))
    for sampling in [
        SamplingParams(0.5, 3, 0.9, 0.1),
        SamplingParams(0.0, 7, 0.2, 0.5),
        SamplingParams(2.0, 50, 1.0, 0.0),
    ]:
        np.testing.assert_allclose(jit(logits, sampling), filter_logits(logits, sampling), rtol=1e-6)
    assert jit._cache_size() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "0 or more"),
        ({"temperature": float("nan")}, "finite"),
        ({"temperature": float("inf")}, "finite"),
        ({"top_k": 0}, "1 or more"),
        ({"top_k": 2.5}, "whole number"),
        ({"top_p": 0.0}, r"\(0, 1\]"),
        ({"top_p": np.float32(1.5)}, r"\(0, 1\]"),
        ({"min_p": -0.1}, r"\[0, 1\]"),
    ],
)
def test_invalid_parameters_are_rejected(options, message):
    with pytest.raises(InputError, match=message) as error:
        SamplingParams(**options)
    assert f"SamplingParams.{next(iter(options))}" in str(error.value)


@pytest.mark.parametrize("spec", [P("data", None), P("data", "tensor"), P(None, "tensor"), P(None, None)])
def test_sampling_on_explicit_mesh(spec):
    """A single device suffices: an Explicit mesh checks sharding types on any number of devices."""
    tensor = 2 if jax.device_count() % 2 == 0 else 1
    mesh = jax.make_mesh((jax.device_count() // tensor, tensor), ("data", "tensor"))
    size, sampling = 2 * jax.device_count(), SamplingParams(0.8, 20, 0.9, 0.05)
    logits = jax.random.normal(jax.random.key(0), (size, 64))
    expected = jit_sample(row_keys(jax.random.key(1), jnp.arange(size)), logits, sampling)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(logits, spec)
        keys = row_keys(jax.random.key(1), jnp.arange(size))
        ids = jit_sample(keys, sharded, sampling)
        assert jax.typeof(ids).sharding.spec == P(spec[0])
        assert jax.typeof(jit_filter(sharded, sampling)).sharding.spec == P(spec[0], None)
    np.testing.assert_array_equal(ids, expected)


@pytest.mark.parity
@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), samplings())
def test_parity_with_transformers(seed, sampling):
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    # Logits are distinct: of equal logits at the border of a filter, transformers keeps some,
    # attnlab all or none.
    logits = np.random.default_rng(seed).normal(scale=2, size=(3, 9)).astype(np.float32)
    for row in logits:
        oracle(row, sampling)  # rejects borderline cases, which depend on rounding
    warpers = [process.TemperatureLogitsWarper(sampling.temperature)]
    warpers += [process.TopKLogitsWarper(sampling.top_k)] if sampling.top_k is not None else []
    warpers += [process.TopPLogitsWarper(sampling.top_p)] if sampling.top_p not in (None, 1.0) else []
    warpers += [process.MinPLogitsWarper(sampling.min_p)] if sampling.min_p is not None else []
    expected = torch.from_numpy(logits)
    for warper in warpers:
        expected = warper(None, expected)
    np.testing.assert_allclose(
        jax.nn.softmax(jit_filter(jnp.array(logits), sampling)), expected.softmax(-1).numpy(), atol=1e-5
    )
