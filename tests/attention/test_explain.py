"""`explain`, backend selection and registration."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from attnlab.attention import attend, causal, explain, register, segments, window
from attnlab.attention.attend import AUTO_ORDER
from attnlab.attention.backends.reference import Reference
from attnlab.attention.backends.registry import BACKENDS, AttentionResult
from attnlab.attention.block_mask import default_block_sizes
from tests.attention.inputs import qkv

SHAPE = jax.ShapeDtypeStruct((2, 512, 4, 16), jnp.float32)


def test_counts_match_the_mask():
    explanation = explain(SHAPE, SHAPE, SHAPE, mask=causal() & window(63))
    pairs = 64 * 65 // 2 + (512 - 64) * 64
    assert explanation.backend == "blockwise"
    assert explanation.density == pytest.approx(pairs / 512**2)
    assert explanation.flops == pytest.approx(2 * 4 * pairs * 4 * 16)
    blocks = 512 // default_block_sizes(512, 512)[0]
    assert explanation.blocks == (blocks * blocks - (2 * blocks - 1), 2 * blocks - 1, 0)
    assert explain(SHAPE, SHAPE, SHAPE).blocks == (0, 0, blocks * blocks)


def test_memory_of_blockwise_is_less_than_all_scores():
    shape = jax.ShapeDtypeStruct((1, 2048, 2, 16), jnp.float32)
    blockwise, reference = (
        explain(shape, shape, shape, mask=causal(), backend=name) for name in ("blockwise", "reference")
    )
    scores = 2 * 2048 * 2048 * 4
    assert reference.memory > scores > 4 * blockwise.memory


def test_every_other_backend_has_a_reason():
    explanation = explain(SHAPE, SHAPE, SHAPE, return_weights=True)
    assert explanation.backend == "reference"
    assert "return_weights" in explanation.rejected["blockwise"]
    assert set(explanation.rejected) == {backend.name for backend in BACKENDS} - {"reference"}
    text = str(explanation)
    assert "backend   reference" in text and "not blockwise: it does not materialize the weights" in text
    assert explain(SHAPE, SHAPE, SHAPE).rejected["reference"] == "blockwise has priority"


def test_traced_mask():
    explanations = []

    @jax.jit
    def run(ids):
        explanations.append(explain(SHAPE, SHAPE, SHAPE, mask=segments(ids)))
        return ids

    run(jnp.ones((2, 512), jnp.int32))
    assert (explanations[0].density, explanations[0].blocks) == (None, None)
    assert "traced" in str(explanations[0])


def test_selection_depends_on_the_sharding():
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Explicit,) * 2)
    sharding = jax.NamedSharding(mesh, P("data", "sequence", None, None))
    shape = jax.ShapeDtypeStruct(SHAPE.shape, SHAPE.dtype, sharding=sharding)
    with jax.set_mesh(mesh):
        explanation = explain(shape, shape, shape, mask=causal())
    assert explanation.backend == "ring"
    assert explanation.rejected["blockwise"] == "the length is sharded over sequence"


class Doubled(Reference):
    """A third-party backend."""

    name = "doubled"

    def unsupported_reason(self, args):
        return "it does not support masks" if args.mask is not None else None

    def run(self, args, offset):
        return AttentionResult(2 * super().run(args, offset).out, jnp.zeros(args.query.shape[:3]))


def test_third_party_backend(unchecked):
    arrays = qkv(0, s=5)
    plain = attend(*arrays)
    register(Doubled(), before="blockwise")
    try:
        assert jnp.allclose(attend(*arrays), 2 * plain, atol=1e-5)
        assert explain(*arrays, mask=causal()).rejected["doubled"] == "it does not support masks"
        with pytest.raises(ValueError, match="a backend named 'doubled' is already registered"):
            register(Doubled())
    finally:
        BACKENDS[:] = [backend for backend in BACKENDS if backend.name != "doubled"]
    assert jnp.allclose(attend(*arrays, backend=Doubled()), 2 * plain, atol=1e-5)  # not registered


def test_auto_order():
    names = ["ring", "all_to_all", "all_gather", "splash", "flash", "cudnn", "tokamax"]
    names += ["decode", "blockwise", "blockwise_autodiff", "reference"]
    assert [backend.name for backend in AUTO_ORDER] == names
    assert tuple(BACKENDS) == AUTO_ORDER
