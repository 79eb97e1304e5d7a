"""Low-rank adapters, and parameters that stay."""

import dataclasses
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from attnlab.layers import ExpertsConfig
from attnlab.layers.experts import ExpertLinear
from attnlab.layers.linear import Linear
from attnlab.layers.parameters import parameter_name
from attnlab.models import ContrastiveConfig, DecoderConfig, RecurrentSeq2SeqConfig, Seq2SeqConfig
from attnlab.pretrained.import_export import abstract_params
from attnlab.train import AdamW, Constant, LoRA, Rule
from attnlab.train.describe import describe
from attnlab.train.optimizers import matrix_axes
from tests.train.small import experiment, random_batch, session

EVERYWHERE = LoRA(rank=3, alpha=6.0, rule=r"(attention|feed_forward)/.*kernel$|embedding")
FAST = AdamW(learning_rate=3e-2, schedule=Constant())


def tuned(lora=EVERYWHERE, **fields):
    return dataclasses.replace(experiment(optimizer=FAST, **fields), lora=lora)


def named(tree):
    return {parameter_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def trained(made, steps=3):
    state = made.new_state()
    for step in range(steps):
        state, metrics = made.train_step(state, made.to_devices(random_batch(step % 2)))
    return state, metrics


def test_at_first_the_model_is_as_it_was_and_only_adapters_change():
    made = session(tuned())
    plain = named(session(experiment()).new_params())
    state = made.new_state()
    before = named(made.eval_params(state))
    assert before.keys() == plain.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(x, plain[name], err_msg=name)
    state, _ = trained(made)
    assert all(name.startswith("lora/") for name in named(state.params))
    assert len(jax.tree.leaves(state.opt_state[0].mu)) == len(jax.tree.leaves(state.params))
    for name, x in named(state.frozen).items():
        np.testing.assert_array_equal(x, plain[name], err_msg=name)
    for name, x in named(made.eval_params(state)).items():
        assert np.array_equal(x, plain[name]) != bool(re.search(EVERYWHERE.rule, name)), name


def test_the_sum_is_that_of_the_paper():
    """W + (alpha / r) A B of every layer by itself, A reading what W reads."""
    made = session(tuned())
    state, _ = trained(made)
    params, frozen, got = map(flatten_dict, (state.params, state.frozen, made.eval_params(state)))
    block = ("layers", "periods", "block0")
    for *path, inputs, outputs in (
        ("attention", "query", "kernel", 16, 16),
        ("attention", "value", "kernel", 16, 8),
        ("attention", "out", "kernel", 16, 16),
        ("feed_forward", "down", "kernel", 32, 16),
    ):
        path = (*block, *path)
        for layer in range(2):
            a = np.asarray(params["lora", *path, "a"][layer], np.float64).reshape(inputs, 3)
            b = np.asarray(params["lora", *path, "b"][layer], np.float64).reshape(3, outputs)
            w = np.asarray(frozen[path][layer]).reshape(inputs, outputs)
            np.testing.assert_allclose(
                np.asarray(got[path][layer]).reshape(w.shape), w + 2 * a @ b, atol=1e-6
            )
            assert np.linalg.matrix_rank(a @ b) == 3
    assert params["lora", "embedding", "table", "a"].shape == (257, 3)


MODELS = [
    DecoderConfig(feed_forward=ExpertsConfig()),
    Seq2SeqConfig(),
    RecurrentSeq2SeqConfig(),
    ContrastiveConfig(),
]


@pytest.mark.parametrize("config", MODELS, ids=lambda config: type(config).__name__)
def test_matrices_are_cut_where_their_maps_cut_them(config):
    """By their names, which is all that is known of them here."""
    inputs = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, Linear | ExpertLinear):
            i = context.module.inputs
            inputs["/".join((*context.module.path, "kernel"))] = i if isinstance(i, tuple) else (i,)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes = {"/".join(path): x.shape for path, x in flatten_dict(abstract_params(config)).items()}
    assert len(inputs) >= 6
    for name, shape in shapes.items():
        axes = matrix_axes(name, len(shape))
        assert (axes is None) == (not name.endswith(("kernel", "table"))), name
        if name in inputs:
            assert shape[slice(*axes)] == inputs[name], name
        elif name.endswith("patches/kernel"):
            assert axes == (0, 3)


@pytest.mark.parametrize("feed_forward", [None, ExpertsConfig(experts=4, width=8)], ids=["mlp", "experts"])
def test_on_a_mesh_it_trains_the_same(feed_forward):
    model = {} if feed_forward is None else {"feed_forward": feed_forward}
    one, many = (session(tuned(model=model), mesh) for mesh in ("single", "data:2,fsdp:2,tensor:2"))
    (state, metrics), (sharded, same) = trained(one), trained(many)
    assert float(same["loss"]) == pytest.approx(float(metrics["loss"]), abs=1e-4)
    query = sharded.params["lora"]["layers"]["periods"]["block0"]["attention"]["query"]["kernel"]
    assert query["a"].sharding.spec == jax.P(None, "fsdp", None)
    assert query["b"].sharding.spec == jax.P(None, None, "tensor", None)
    expected = named(one.eval_params(state))
    for name, x in named(many.eval_params(sharded)).items():
        np.testing.assert_allclose(x, expected[name], atol=1e-4, err_msg=name)
    where = jax.tree.map(lambda x: x.sharding.spec, many.eval_params(sharded))
    assert where == jax.tree.map(lambda x: x.sharding.spec, many.abstract_params)


def test_described_by_what_is_trained():
    made = session(tuned(LoRA(rank=2, rule="query/kernel$")))
    text = describe(made)
    count = 2 * (16 * 2 + 2 * 16)  # of two layers, 16 wide
    assert re.search(rf"^  trained +{count}$", text, re.MULTILINE)
    assert "lora/layers/periods/block0/attention/query/kernel/a" in text
    assert "  trained " not in describe(session(experiment()))


def test_averages_microbatches_and_what_is_trained_in_full():
    lora = dataclasses.replace(EVERYWHERE, full="^norm/")
    made = session(tuned(lora, ema=0.5, microbatches=2))
    state, _ = trained(made, 1)
    assert {name.partition("/")[0] for name in named(state.params)} == {"lora", "norm"}
    start, now = named(made.new_state().params), named(state.params)
    for name, x in named(state.ema).items():  # one step goes nine tenths of the way
        np.testing.assert_allclose(x, now[name] * 0.9 + start[name] * 0.1, atol=1e-6)
    block = "layers/periods/block0/attention/query/kernel"
    kernels = [named(made.eval_params(s))[block] for s in (state, dataclasses.replace(state, ema=None))]
    assert not np.array_equal(*kernels)


def test_a_rate_of_nothing_freezes_and_costs_no_moments():
    rules = (Rule("^embedding|kernel$", learning_rate=0.0),)
    made = session(experiment(optimizer=dataclasses.replace(FAST, rules=rules)))
    state, start = made.new_state(), named(made.new_params())
    assert (
        named(state.opt_state[0].mu).keys()
        == named(state.params).keys()
        == start.keys() - named(state.frozen).keys()
    )
    state, metrics = made.train_step(state, made.to_devices(random_batch()))
    norms = np.sqrt(np.sum(np.square(metrics["leaf_norms"])))
    np.testing.assert_allclose(metrics["grad_norm"], norms, rtol=1e-6)
    for name, x in named(made.eval_params(state)).items():
        assert np.array_equal(x, start[name]) == bool(re.search("^embedding|kernel$", name)), name


def test_refusals(refuses):
    with refuses("lora.rule: 'nothing' matches no parameter; names are like embedding/table"):
        session(tuned(LoRA(rule="nothing"))).optimizer  # noqa: B018
    with refuses("lora.rule: 'norm' matches", "which is not a matrix"):
        session(tuned(LoRA(rule="norm"))).optimizer  # noqa: B018
    with refuses("lora.full: 'nothing' matches no parameter"):
        session(tuned(LoRA(full="nothing"))).optimizer  # noqa: B018
    with refuses("lora.rule: '(' is not a regular expression"):
        LoRA(rule="(")
    with pytest.raises(ValueError, match="rank"):
        LoRA(rank=0)
    with refuses("leaves nothing to train"):
        session(experiment(optimizer=AdamW(rules=(Rule("", learning_rate=0.0),)))).optimizer  # noqa: B018
