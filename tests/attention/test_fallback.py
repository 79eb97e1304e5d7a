"""Backends that "auto" skips, and programs that compile again without a refused kernel."""

import jax
import jax.numpy as jnp
import pytest

from attnlab.attention import attend, causal, exclude_backends, explain, register
from attnlab.attention.backends.blockwise import Blockwise
from attnlab.attention.backends.reference import Reference
from attnlab.attention.backends.registry import BACKENDS, Selection, record_selections
from attnlab.attention.fallback import Fallback, kernel_scope, refused_kernels
from tests.attention.inputs import qkv

SHAPE = jax.ShapeDtypeStruct((2, 256, 4, 16), jnp.float32)
VMEM = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack"


class Kernel(Reference):
    """A kernel whose compilation fails with a message of the compiler."""

    name, message = "kernel", f"{VMEM}: op_name={kernel_scope('kernel')}"

    def run(self, args, offset):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.fixture
def kernel():
    register(Kernel())
    yield
    BACKENDS[:] = [backend for backend in BACKENDS if backend.name != "kernel"]


def test_auto_skips_excluded_backends_in_compiled_programs(refuses):
    query, key, value = qkv(0)
    run, selected = jax.jit(lambda *x: attend(*x)), []
    with record_selections(lambda selection: selected.append(selection.backend)):
        run(query, key, value)
        with exclude_backends("blockwise", "blockwise_autodiff"):
            out = run(query, key, value)  # traced again, as jit's cache key differs
            assert explain(query, key, value).rejected["blockwise"] == "exclude_backends excludes it"
            assert jnp.allclose(attend(query, key, value, backend="blockwise"), out, atol=1e-5)
        run(query, key, value)
    assert selected[:2] == ["blockwise", "reference"] and run._cache_size() == 2
    with refuses("exclude_backends", "no backend 'flsh'"), exclude_backends("flsh"):
        pass


def test_nested_exclusions_add_up():
    with exclude_backends(blockwise="a reason"), exclude_backends("blockwise_autodiff"):
        explanation = explain(SHAPE, SHAPE, SHAPE)
    assert (explanation.backend, explanation.rejected["blockwise"]) == ("reference", "a reason")
    assert explain(SHAPE, SHAPE, SHAPE).backend == "blockwise"


def test_explain_falls_back_where_the_compiler_refuses(kernel):
    with pytest.warns(UserWarning, match="without kernel, refused with: RESOURCE_EXHAUSTED"):
        explanation = explain(SHAPE, SHAPE, SHAPE, mask=causal())
    assert explanation.backend == "blockwise"
    assert "the compiler refused it: RESOURCE_EXHAUSTED" in explanation.rejected["kernel"]


def test_fallback_remembers_the_refusal(kernel):
    arrays, lines = qkv(0), []
    fallback, run = Fallback(lines.append), jax.jit(attend)
    outputs = [fallback(run, *arrays) for _ in range(2)]
    assert jnp.array_equal(*outputs) and len(lines) == 1 and list(fallback.refused) == ["kernel"]


def test_other_errors_and_named_backends_are_raised(kernel, monkeypatch):
    arrays = qkv(0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"), pytest.warns(UserWarning):
        Fallback()(lambda: attend(*arrays, backend="kernel"))
    for message in ("INVALID_ARGUMENT: a shape", VMEM.replace("vmem", "hbm") + " by scoped"):
        monkeypatch.setattr(Kernel, "message", message)
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            Fallback()(lambda: attend(*arrays))


def test_message_names_the_refused_kernel():
    selections = [Selection(name, "tpu", {}, (), ()) for name in ("splash", "flash", "blockwise")]
    assert refused_kernels(f"{VMEM} ... {kernel_scope('flash')}", selections) == ["flash"]
    assert refused_kernels("Mosaic failed to compile", selections) == ["splash", "flash"]
    assert refused_kernels("Mosaic failed to compile", selections[2:]) == []


def test_compiled_program_names_the_cure_beside_each_kernel(monkeypatch):
    """Compilers quote the scope of the operation that they refuse."""
    query, key, value = qkv(0, b=1, t=128, s=128, h=1, k=1)

    class Third(Blockwise):
        name = "third"

    def text(backend):
        gradient = jax.grad(lambda *x: attend(*x, backend=backend).sum(), (0, 1, 2))
        return jax.jit(gradient).lower(query, key, value).as_text(debug_info=True)

    cure = "to avoid it: with exclude_backends(third)"
    assert cure in text(Third()) and f"transpose(jvp({kernel_scope('third')}))" in text(Third())
    assert "exclude_backends" not in text("blockwise")
