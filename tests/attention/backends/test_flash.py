"""Flash attention in Pallas interpret mode against the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import alibi, attend, bias, causal, segments, softcap
from attnlab.attention.backends.flash import Flash
from tests.attention.backends.test_splash import ARGS, DOCUMENTS, SHAPE, S, T, assert_equal, long_shape
from tests.attention.inputs import qkv, weighted_sum

RNG = np.random.default_rng(0)
BIASED = Flash(max_block_size=128, interpret=True)


@pytest.mark.parametrize("name", ["bias", "alibi", "causal"])
def test_flash_and_its_bias_gradients_match_reference(name):
    sinks = jnp.asarray([0.5, -1.0, 3.0, 0.0])
    mask = {
        "bias": causal(-60) & segments(*DOCUMENTS),
        "alibi": RNG.random((2, 1, T, S)) < 0.3,
        "causal": causal(),
    }[name]
    array = (
        jnp.linspace(0.1, 0.8, 4)
        if name == "alibi"
        else jnp.asarray(RNG.normal(size=(1, 4, T, S)), jnp.float32)
    )
    score = alibi if name == "alibi" else bias

    def loss(array, query, key, value, sinks, backend):
        out, lse = attend(
            *(query, key, value),
            mask=mask,
            score=score(array),
            sinks=sinks,
            backend=backend,
            return_lse=True,
        )
        return weighted_sum(out, lse), (out, lse)

    run = jax.jit(jax.value_and_grad(loss, range(5), has_aux=True), static_argnums=5)
    arrays = array, *qkv(4, **SHAPE), sinks
    assert_equal(run(*arrays, BIASED), run(*arrays, "reference"))


def test_flash_rejects_scores_that_are_not_additive():
    assert Flash().unsupported_reason(dataclasses.replace(ARGS, score=alibi(4))) is None
    assert Flash().unsupported_reason(dataclasses.replace(ARGS, score=bias(jnp.ones((4, 256, 256))))) is None
    assert "only additive" in Flash().unsupported_reason(dataclasses.replace(ARGS, score=softcap(3.0)))


def test_flash_rejects_a_bias_over_the_memory_limit():
    long = dataclasses.replace(ARGS, **dict.fromkeys(("query", "key", "value"), long_shape()))
    assert "32.0 GiB" in Flash().unsupported_reason(long)
