"""The training step on meshes: equal losses, expected shardings and expected collectives."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnlab.sharding import num_batch_shards
from attnlab.train import AdamW, Constant
from tests.selection import sample
from tests.train.small import make_experiment, make_session, random_batch

MESHES = ["single", "data:8", "fsdp:8", "data:2,fsdp:2,tensor:2", "fsdp:4,expert:2"]
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


@pytest.mark.slow
@pytest.mark.parametrize("mesh", sample(MESHES[1:], every=2))
def test_loss_curve_is_the_same_on_every_mesh(mesh):
    assert losses("single")[0] - losses("single")[-1] > 1
    assert losses(mesh) == pytest.approx(losses("single"), abs=1e-4)


@pytest.mark.parametrize("mesh", sample(ALL, every=2))
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
    """One array that a collective of the compiled program produces.

    Attributes:
      kind: one of KINDS.
      shape: its shape on each device.
      line: the line of the program.
      in_entry: whether it runs once, not in a loop or a branch.
    """

    kind: str
    shape: tuple[int, ...]
    line: str = ""
    in_entry: bool = False

    def groups(self):
        """Return the devices that communicate, one row per group."""
        iota = r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
        if match := re.search(iota, self.line):
            groups, sizes, order = (n and list(map(int, n.split(","))) for n in match.groups())
            return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(groups)
        mesh = r"mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}"
        axes, shape, order, varying = re.search(f"replica_groups={mesh}", self.line).groups()
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
        devices = np.arange(math.prod(sizes.values()))
        if shape is not None:
            devices = devices.reshape(list(map(int, shape.split(","))))
            devices = devices.transpose(list(map(int, order.split(","))) if order else None)
        last = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", varying)]
        grid = np.moveaxis(devices.reshape(list(sizes.values())), last, range(-len(last), 0))
        return grid.reshape(-1, math.prod(grid.shape[len(sizes) - len(last) :]))


def in_groups_of_one(line):
    """Return whether devices communicate with themselves alone; JAX 0.12 keeps such collectives."""
    if "replica_groups=mesh" in line:
        return Collective("", (), line).groups().shape[1] == 1
    return bool(re.search(r"replica_groups=\{\{\d+\}[,}]", line))


def collectives(text):
    """Return the collectives in a program's text, one entry per array of a tuple result."""
    found, in_entry = [], False
    for line in text.splitlines():
        if line.endswith("{"):  # the start of a computation
            in_entry = line.startswith("ENTRY")
        match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if match and not in_groups_of_one(line):
            result, kind, start = match.groups()
            shapes = [
                tuple(map(int, filter(None, s.split(",")))) for s in re.findall(r"\w+\[([\d,]*)\]", result)
            ]
            if start and kind == "all-gather":
                shapes = shapes[len(shapes) // 2 :]  # operands, then results
            found += [Collective(kind, shape, line, in_entry) for shape in shapes]
    return found


def compiled(mesh, microbatches=1, **model):
    session = make_session(
        make_experiment(
            model={"width": WIDTH, "scan": True} | model,
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
    """Return the all-gathers whose result does not have the size of a parameter.

    Those of the residual stream are left out: a tensor axis shards its length.
    """
    shape, length = session.mesh.shape, session.experiment.data.sequence_length
    rows = ROWS // num_batch_shards(session.mesh) // session.experiment.train.microbatches
    known = parameter_shapes(session) | ({rows * length * WIDTH} if shape["tensor"] > 1 else set())
    return [c for c in found if c.kind == "all-gather" and math.prod(c.shape) not in known]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        "single",
        "data:8",
        "fsdp:8",
        "tensor:2",
        "fsdp:4,tensor:2",
        "data:2,fsdp:2,tensor:2",
        "fsdp:4,expert:2",
    ],
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
    if shape["fsdp"] > 1 or shape["tensor"] > 1:
        assert kinds["all-gather"] > 0
    else:
        assert kinds["all-gather"] == 0


def test_microbatches_add_no_collectives():
    session, found = compiled("data:2,fsdp:2,tensor:2", microbatches=2)
    assert not {"all-to-all", "collective-permute"} & {c.kind for c in found}
    assert of_activations(session, found) == []


def crossing(found, slice_of):
    """Return the collectives whose groups have devices of several slices."""
    return [c for c in found if any(len(set(slice_of[group])) > 1 for group in c.groups())]


def test_gradients_cross_the_slow_axis_once_a_step():
    """The mesh is that of `dcn_data:2,fsdp:4`: devices 0 to 3 are one slice, and 4 to 7 another."""
    session, found = compiled("data:2,fsdp:4", tied=False)
    found_across = crossing(found, np.arange(8) // 4)
    assert {c.kind for c in found_across} == {"all-reduce"}
    depth = session.experiment.model.depth  # the layers' gradients are summed in a loop over layers
    sizes = [math.prod(c.shape) * (1 if c.in_entry else depth) for c in found_across if c.shape]
    params = session.abstract_state.params
    # A device has the gradient of its part of the table of tokens, a quarter of the width.
    expected = sum(x.size for x in jax.tree.leaves(params)) - params["embedding"]["table"].size * 3 // 4
    assert sum(sizes) == expected
    scalars = [c for c in found_across if not c.shape]
    assert all(c.in_entry for c in scalars) and len(scalars) < 10
    assert "all-gather" in {c.kind for c in crossing(found, np.arange(8) % 2)}  # of an interleaved mesh


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
