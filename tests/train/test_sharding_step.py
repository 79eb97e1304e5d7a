"""The training step on meshes: equal losses, expected shardings and expected collectives."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

import jax
import pytest
from jax.sharding import PartitionSpec as P

from attnlab.train import AdamW, Constant
from tests.train.small import make_experiment, make_session, random_batch

MESHES = ["single", "data:8", "fsdp:8", "data:2,fsdp:2,tensor:2"]
ALL = [*MESHES, "tensor:2", "fsdp:4,tensor:2"]
STEPS = 50


@cache
def losses(mesh):
    session = make_session(
        make_experiment(optimizer=AdamW(learning_rate=1e-2, schedule=Constant(warmup=5)), steps=STEPS), mesh
    )
    state, curve = session.new_state(), []
    for step in range(STEPS):
        state, metrics = session.train_step(state, session.to_devices(random_batch(step % 4)))
        curve.append(float(metrics["loss"]))
    return curve


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_loss_curve_is_the_same_on_every_mesh(mesh):
    assert losses("single")[0] - losses("single")[-1] > 1
    assert losses(mesh) == pytest.approx(losses("single"), abs=1e-4)


@pytest.mark.parametrize("mesh", ALL)
def test_state_has_expected_shardings_before_and_after_a_step(mesh):
    session = make_session(make_experiment(ema=0.9), mesh)
    state = session.new_state()
    specs = {name: x.sharding.spec for name, x in named(state.params).items()}
    block = "layers/periods/block0"
    vocabulary = P(None, "fsdp") if session.mesh.shape["tensor"] > 1 else P("tensor", "fsdp")  # 257 is odd
    assert specs["embedding/table"] == vocabulary
    for name in ("query", "key", "value"):
        assert specs[f"{block}/attention/{name}/kernel"] == P(None, "fsdp", "tensor", None)
    assert specs[f"{block}/attention/out/kernel"] == P(None, "tensor", None, "fsdp")
    assert specs[f"{block}/feed_forward/up/kernel"] == P(None, "fsdp", "tensor")
    assert specs[f"{block}/feed_forward/up/bias"] == P(None, "tensor")
    assert specs[f"{block}/feed_forward/down/kernel"] == P(None, "tensor", "fsdp")
    assert specs["norm/scale"] == P(None)
    for moments in (state.opt_state[0].mu, state.opt_state[0].nu, state.ema):
        assert {name: x.sharding.spec for name, x in named(moments).items()} == specs
    after, _ = session.train_step(state, session.to_devices(random_batch()))
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(session.abstract_state), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def named(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }


# Collectives --------------------------------------------------------------------------------------

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
ROWS, LENGTH, WIDTH = 24, 20, 48  # sizes that distinguish activations from parameters


@dataclass(frozen=True)
class Collective:
    """One array that a collective of the compiled program produces."""

    kind: str
    shape: tuple[int, ...]


def collectives(text):
    """Return the collectives in a program's text, one entry per array of a tuple result."""
    found = []
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if match:
            result, kind, start = match.groups()
            shapes = [
                tuple(map(int, filter(None, s.split(",")))) for s in re.findall(r"\w+\[([\d,]*)\]", result)
            ]
            if start and kind == "all-gather":
                shapes = shapes[len(shapes) // 2 :]  # operands, then results
            found += [Collective(kind, shape) for shape in shapes]
    return found


def compiled(mesh, microbatches=1):
    session = make_session(
        make_experiment(
            model={"width": WIDTH, "scan": True},
            batch_size=ROWS,
            microbatches=microbatches,
        ),
        mesh,
    )
    return session, collectives(session.compile_train_step().as_text())


def parameter_shapes(session):
    """Return the per-device sizes of parameters gathered over fsdp (still sharded over tensor).

    Includes the size of one layer of a scanned stack, which is gathered at a time. Sizes are
    compared rather than shapes, since the compiler may merge or reorder dimensions.
    """
    shapes = set()
    for x in jax.tree.leaves(session.abstract_state.params):
        spec = (*x.sharding.spec, *(None,) * (x.ndim - len(x.sharding.spec)))
        shard = tuple(
            size // (session.mesh.shape["tensor"] if axis == "tensor" else 1)
            for size, axis in zip(x.shape, spec, strict=True)
        )
        shapes |= {math.prod(shard), math.prod(shard[1:])}
    return shapes


def of_activations(session, found):
    """Return the all-gathers whose result does not have the size of a parameter."""
    return [
        c for c in found if c.kind == "all-gather" and math.prod(c.shape) not in parameter_shapes(session)
    ]


@pytest.mark.parametrize(
    "mesh", ["single", "data:8", "fsdp:8", "tensor:2", "fsdp:4,tensor:2", "data:2,fsdp:2,tensor:2"]
)
def test_step_has_only_expected_collectives(mesh):
    session, found = compiled(mesh)
    kinds = Counter(c.kind for c in found)
    assert not {"all-to-all", "collective-permute"} & set(kinds), found
    assert of_activations(session, found) == []
    shape = session.mesh.shape
    if mesh == "single":
        assert not kinds
    else:
        assert kinds["all-reduce"] + kinds["reduce-scatter"] > 0
    if shape["fsdp"] > 1:
        assert kinds["all-gather"] > 0
    else:
        assert kinds["all-gather"] == 0


def test_microbatches_add_no_collectives():
    session, found = compiled("data:2,fsdp:2,tensor:2", microbatches=2)
    assert not {"all-to-all", "collective-permute"} & {c.kind for c in found}
    assert of_activations(session, found) == []


def test_of_activations_detects_a_gathered_activation():
    """A program that gathers the batch is distinguished from one that gathers a parameter."""
    session = make_session(make_experiment(model={"width": WIDTH}, batch_size=ROWS), "fsdp:8")
    with jax.set_mesh(session.mesh):
        x = jax.ShapeDtypeStruct(
            (ROWS, 16, WIDTH), "float32", sharding=jax.NamedSharding(session.mesh, P("fsdp"))
        )
        text = (
            jax.jit(lambda x: jax.sharding.reshard(x, P(None, None, None)) * 2).lower(x).compile().as_text()
        )
    assert of_activations(session, collectives(text))
