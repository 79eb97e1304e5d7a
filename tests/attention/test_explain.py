import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from attnlab.attention import attend, causal, explain, register, segments, window
from attnlab.attention.attend import AUTO_ORDER
from attnlab.attention.backends.blockwise import default_block_sizes
from attnlab.attention.backends.reference import Reference
from attnlab.attention.backends.registry import BACKENDS, AttentionResult
from tests.attention.inputs import qkv

SHAPE = jax.ShapeDtypeStruct((2, 512, 4, 16), jnp.float32)


def test_counts_are_those_of_the_mask():
    told = explain(SHAPE, SHAPE, SHAPE, mask=causal() & window(63))
    pairs = 64 * 65 // 2 + (512 - 64) * 64
    assert told.backend == "blockwise"
    assert told.density == pytest.approx(pairs / 512**2)
    assert told.flops == pytest.approx(2 * 4 * pairs * 4 * 16)
    blocks = 512 // default_block_sizes(512, 512)[0]
    assert told.blocks == (blocks * blocks - (2 * blocks - 1), 2 * blocks - 1, 0)
    assert explain(SHAPE, SHAPE, SHAPE).blocks == (0, 0, blocks * blocks)


def test_memory_is_that_of_the_program_and_less_than_all_scores():
    shape = jax.ShapeDtypeStruct((1, 2048, 2, 16), jnp.float32)
    told = [explain(shape, shape, shape, mask=causal(), backend=name) for name in ("blockwise", "reference")]
    scores = 2 * 2048 * 2048 * 4
    assert told[1].memory > scores > 4 * told[0].memory


def test_every_other_backend_says_why():
    told = explain(SHAPE, SHAPE, SHAPE, return_weights=True)
    assert told.backend == "reference"
    assert "return_weights" in told.rejected["blockwise"]
    assert set(told.rejected) == {backend.name for backend in BACKENDS} - {"reference"}
    text = str(told)
    assert "backend   reference" in text and "not blockwise: it never holds the weights" in text
    assert explain(SHAPE, SHAPE, SHAPE).rejected["reference"] == "blockwise comes first"


def test_a_mask_known_only_when_run():
    told = []

    @jax.jit
    def run(ids):
        told.append(explain(SHAPE, SHAPE, SHAPE, mask=segments(ids)))
        return ids

    run(jnp.ones((2, 512), jnp.int32))
    assert (told[0].density, told[0].blocks) == (None, None)
    assert "known only when run" in str(told[0])


def test_the_layout_decides_too():
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Explicit,) * 2)
    where = jax.NamedSharding(mesh, P("data", "sequence", None, None))
    shape = jax.ShapeDtypeStruct(SHAPE.shape, SHAPE.dtype, sharding=where)
    with jax.set_mesh(mesh):
        told = explain(shape, shape, shape, mask=causal())
    assert told.backend == "ring"
    assert told.rejected["blockwise"] == "the length is sharded over sequence"


class Doubled(Reference):
    """A third party's backend."""

    name = "doubled"

    def unsupported_reason(self, request):
        return "it has no masks" if request.mask is not None else None

    def run(self, request, first):
        return AttentionResult(2 * super().run(request, first).out, jnp.zeros(request.query.shape[:3]))


def test_a_backend_of_a_third_party(unchecked):
    arrays = qkv(0, s=5)
    plain = attend(*arrays)
    register(Doubled(), before="blockwise")
    try:
        assert jnp.allclose(attend(*arrays), 2 * plain, atol=1e-5)
        assert explain(*arrays, mask=causal()).rejected["doubled"] == "it has no masks"
        with pytest.raises(ValueError, match="there is a backend named 'doubled'"):
            register(Doubled())
    finally:
        BACKENDS[:] = [backend for backend in BACKENDS if backend.name != "doubled"]
    assert jnp.allclose(attend(*arrays, backend=Doubled()), 2 * plain, atol=1e-5)  # and without


def test_the_order_of_auto():
    names = ["ring", "all_to_all", "all_gather", "splash", "flash", "cudnn", "tokamax"]
    names += ["decode", "blockwise", "blockwise_autodiff", "reference"]
    assert [backend.name for backend in AUTO_ORDER] == names
    assert tuple(BACKENDS) == AUTO_ORDER
