"""Programs that eager calls of `attend` compile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import alibi, attend, causal, normalizers, register, segments, softcap, window
from attnlab.attention.backends.reference import Reference
from attnlab.attention.backends.registry import BACKENDS
from tests.attention.inputs import qkv

# Each case makes its masks, scores and normalizers anew in every call.
CASES = {
    "mask": lambda: {"mask": causal() & window(5)},
    "arrays": lambda: {"mask": segments(jnp.ones((2, 80), int)), "score": [alibi(4), softcap(3.0)]},
    "functions": lambda: {
        "mask": lambda b, h, q, k: (q >= k) & (k % 3 < 2),
        "score": lambda s, b, h, q, k: jnp.where(q > k, s, 0.5 * s),
    },
    "reference": lambda: {"mask": causal(3), "normalizer": normalizers.top_k(5)},
}


@pytest.fixture
def compilations():
    """Count the programs that XLA compiles."""
    names = []

    def listen(name, *_, **__):
        if "backend_compile" in name:
            names.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("case", CASES)
def test_repeated_eager_calls_compile_nothing(compilations, case):
    arrays = qkv(0, t=80, s=80)

    def run():
        def loss(query):
            return attend(query, *arrays[1:], **CASES[case]()).sum()

        return attend(*arrays, **CASES[case]()), jax.grad(loss)(arrays[0])

    first = run()
    assert compilations
    compilations.clear()
    second = run()
    assert not compilations
    assert all(map(jnp.array_equal, first, second))


def test_calls_that_differ_in_a_number_do_not_share_a_program():
    arrays = qkv(0, t=4, s=4)
    for left in (1, 2):
        for offset in (0, 1):
            mask, cap = window(left, 0, offset), softcap(1.0 + offset)
            got, expected = (
                attend(*arrays, mask=mask_, score=cap, backend="blockwise")
                for mask_ in (mask, np.asarray(mask.materialize(4, 4)))
            )
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_functions_that_differ_in_a_constant_do_not_share_a_program():
    arrays = qkv(0, t=4, s=4)
    for n in (1, 2):
        table = jnp.arange(4) * n

        def allows(b, h, q, k):
            return jnp.where(q > 0, table[k] <= 2, k < n)  # noqa: B023

        allowed = [[k * n <= 2 if q > 0 else k < n for k in range(4)] for q in range(4)]
        expected = attend(*arrays, mask=np.array(allowed))
        np.testing.assert_allclose(attend(*arrays, mask=allows), expected, rtol=1e-6, atol=1e-6)


def test_registered_backend_replaces_the_compiled_program():
    class Zero(Reference):
        name = "zero"

        def run(self, args, offset):
            result = super().run(args, offset)
            return result._replace(out=jnp.zeros_like(result.out))

    arrays = qkv(0)
    assert attend(*arrays).any()
    register(Zero())
    try:
        assert not attend(*arrays).any()
    finally:
        BACKENDS[:] = [backend for backend in BACKENDS if backend.name != "zero"]
    assert attend(*arrays).any()
