"""The step on meshes: the same losses, arrays where they belong, and only the collectives that are meant."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

import jax
import pytest
from jax.sharding import PartitionSpec as P

from attnlab.train import AdamW, Constant
from tests.train.small import experiment, random_batch, session

MESHES = ["single", "data:8", "fsdp:8", "data:2,fsdp:2,tensor:2"]
ALL = [*MESHES, "tensor:2", "fsdp:4,tensor:2"]
STEPS = 50


@cache
def losses(mesh):
    made = session(
        experiment(optimizer=AdamW(learning_rate=1e-2, schedule=Constant(warmup=5)), steps=STEPS), mesh
    )
    state, found = made.new_state(), []
    for step in range(STEPS):
        state, metrics = made.train_step(state, made.to_devices(random_batch(step % 4)))
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_the_loss_curve_is_the_same_on_every_mesh(mesh):
    assert losses("single")[0] - losses("single")[-1] > 1
    assert losses(mesh) == pytest.approx(losses("single"), abs=1e-4)


@pytest.mark.parametrize("mesh", ALL)
def test_state_lies_where_it_belongs_and_stays_there(mesh):
    made = session(experiment(ema=0.9), mesh)
    state = made.new_state()
    specs = {name: x.sharding.spec for name, x in named(state.params).items()}
    block = "layers/periods/block0"
    vocabulary = P(None, "fsdp") if made.mesh.shape["tensor"] > 1 else P("tensor", "fsdp")  # 257 is odd
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
    after, _ = made.train_step(state, made.to_devices(random_batch()))
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(made.abstract_state), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def named(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }


# Collectives --------------------------------------------------------------------------------------------

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
ROWS, LENGTH, WIDTH = 24, 20, 48  # sizes by which no activation can be taken for a parameter


@dataclass(frozen=True)
class Collective:
    """One array that a collective of the compiled program makes."""

    kind: str
    shape: tuple[int, ...]


def collectives(text):
    """Every collective of a program's text; one that makes a tuple counts for each of its arrays."""
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
    made = session(
        experiment(
            model={"width": WIDTH, "scan": True},
            batch_size=ROWS,
            microbatches=microbatches,
        ),
        mesh,
    )
    return made, collectives(made.compile_train_step().as_text())


def parameter_shapes(made):
    """The shapes, whole or still cut over tensor, that a parameter has when gathered over fsdp.

    One layer of a scanned stack is gathered at a time, with or without its leading dimension of 1, and
    the compiler is free to merge or to order dimensions: so each shape is the sorted sizes above 1.
    """
    shapes = set()
    for x in jax.tree.leaves(made.abstract_state.params):
        spec = (*x.sharding.spec, *(None,) * (x.ndim - len(x.sharding.spec)))
        cut = tuple(
            size // (made.mesh.shape["tensor"] if axis == "tensor" else 1)
            for size, axis in zip(x.shape, spec, strict=True)
        )
        shapes |= {math.prod(cut), math.prod(cut[1:])}
    return shapes


def activation_sizes(made):
    """Sizes of arrays with a batch dimension on one device and, over fsdp and data, of all of them."""
    sizes = set()
    for pieces in (
        1,
        made.mesh.shape["data"] * made.mesh.shape["fsdp"],
        made.mesh.shape["fsdp"],
        made.mesh.shape["data"],
    ):
        sizes |= {ROWS // pieces, ROWS // pieces * 16}
    return sizes


def of_activations(made, found):
    """The gathers whose result is no parameter's: with a batch dimension, or any other."""
    return [c for c in found if c.kind == "all-gather" and math.prod(c.shape) not in parameter_shapes(made)]


@pytest.mark.parametrize(
    "mesh", ["single", "data:8", "fsdp:8", "tensor:2", "fsdp:4,tensor:2", "data:2,fsdp:2,tensor:2"]
)
def test_collectives_of_the_step(mesh):
    made, found = compiled(mesh)
    kinds = Counter(c.kind for c in found)
    assert not {"all-to-all", "collective-permute"} & set(kinds), found
    assert of_activations(made, found) == []
    shape = made.mesh.shape
    if mesh == "single":
        assert not kinds
    else:
        assert kinds["all-reduce"] + kinds["reduce-scatter"] > 0
    if shape["fsdp"] > 1:
        assert kinds["all-gather"] > 0
    else:
        assert kinds["all-gather"] == 0


def test_microbatches_bring_no_other_collectives():
    made, found = compiled("data:2,fsdp:2,tensor:2", microbatches=2)
    assert not {"all-to-all", "collective-permute"} & {c.kind for c in found}
    assert of_activations(made, found) == []


def test_the_check_finds_a_gathered_activation():
    """A program that gathers the batch is told from one that gathers a parameter."""
    made = session(experiment(model={"width": WIDTH}, batch_size=ROWS), "fsdp:8")
    with jax.set_mesh(made.mesh):
        x = jax.ShapeDtypeStruct(
            (ROWS, 16, WIDTH), "float32", sharding=jax.NamedSharding(made.mesh, P("fsdp"))
        )
        text = (
            jax.jit(lambda x: jax.sharding.reshard(x, P(None, None, None)) * 2).lower(x).compile().as_text()
        )
    assert of_activations(made, collectives(text))
