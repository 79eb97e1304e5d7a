"""Low-rank adapters and frozen parameters."""

import dataclasses
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from attnlab.layers import ExpertsConfig
from attnlab.layers.experts import ExpertLinear
from attnlab.layers.linear import Linear, parameter_name
from attnlab.models import ContrastiveConfig, DecoderConfig, RecurrentSeq2SeqConfig, Seq2SeqConfig
from attnlab.pretrained.import_export import abstract_params
from attnlab.train import AdamW, Constant, LoRA, Rule
from attnlab.train.describe import describe
from attnlab.train.optimizers import matrix_axes
from tests.selection import long
from tests.train.small import make_experiment, make_session, random_batch

EVERYWHERE = LoRA(rank=3, alpha=6.0, rule=r"(attention|feed_forward)/.*kernel$|embedding")
FAST = AdamW(learning_rate=3e-2, schedule=Constant())


def tuned(lora=EVERYWHERE, **fields):
    return dataclasses.replace(make_experiment(optimizer=FAST, **fields), lora=lora)


def named(tree):
    return {parameter_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def trained(session, steps=3):
    state = session.new_state()
    for step in range(steps):
        state, metrics = session.train_step(state, session.to_devices(random_batch(step % 2)))
    return state, metrics


def test_adapters_start_at_zero_and_only_they_change():
    session = make_session(tuned())
    plain = named(make_session(make_experiment()).new_params())
    state = session.new_state()
    before = named(session.eval_params(state))
    assert before.keys() == plain.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(x, plain[name], err_msg=name)
    state, _ = trained(session)
    assert all(name.startswith("lora/") for name in named(state.params))
    assert len(jax.tree.leaves(state.opt_state[0].mu)) == len(jax.tree.leaves(state.params))
    for name, x in named(state.frozen).items():
        np.testing.assert_array_equal(x, plain[name], err_msg=name)
    for name, x in named(session.eval_params(state)).items():
        assert np.array_equal(x, plain[name]) != bool(re.search(EVERYWHERE.rule, name)), name


def test_merged_params_equal_the_formula_of_the_paper():
    """Compare with W + (alpha / r) A B for each layer separately."""
    session = make_session(tuned())
    state, _ = trained(session)
    params, frozen, got = map(flatten_dict, (state.params, state.frozen, session.eval_params(state)))
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
def test_matrix_axes_agree_with_the_modules(config):
    """Compare the axes derived from names with the input axes of the Flax modules."""
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "feed_forward", [None, long(ExpertsConfig(experts=4, width=8))], ids=["mlp", "experts"]
)
def test_lora_on_a_mesh_equals_one_device(feed_forward):
    model = {} if feed_forward is None else {"feed_forward": feed_forward}
    one, many = (make_session(tuned(model=model), mesh) for mesh in ("single", "data:2,fsdp:2,tensor:2"))
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


def test_describe_lists_adapters_and_trained_count():
    session = make_session(tuned(LoRA(rank=2, rule="query/kernel$")))
    text = describe(session)
    count = 2 * (16 * 2 + 2 * 16)  # two layers of width 16
    assert re.search(rf"^  trained +{count}$", text, re.MULTILINE)
    assert "lora/layers/periods/block0/attention/query/kernel/a" in text
    assert "  trained " not in describe(make_session(make_experiment()))


def test_lora_with_ema_microbatches_and_full_parameters():
    lora = dataclasses.replace(EVERYWHERE, full="^norm/")
    session = make_session(tuned(lora, ema=0.5, microbatches=2))
    state, _ = trained(session, 1)
    assert {name.partition("/")[0] for name in named(state.params)} == {"lora", "norm"}
    start, now = named(session.new_state().params), named(state.params)
    for name, x in named(state.ema).items():  # the decay of the first step is 0.1
        np.testing.assert_allclose(x, now[name] * 0.9 + start[name] * 0.1, atol=1e-6)
    block = "layers/periods/block0/attention/query/kernel"
    kernels = [named(session.eval_params(s))[block] for s in (state, dataclasses.replace(state, ema=None))]
    assert not np.array_equal(*kernels)


def test_zero_learning_rate_freezes_without_moments():
    rules = (Rule("^embedding|kernel$", learning_rate=0.0),)
    session = make_session(make_experiment(optimizer=dataclasses.replace(FAST, rules=rules)))
    state, start = session.new_state(), named(session.new_params())
    assert (
        named(state.opt_state[0].mu).keys()
        == named(state.params).keys()
        == start.keys() - named(state.frozen).keys()
    )
    state, metrics = session.train_step(state, session.to_devices(random_batch()))
    norms = np.sqrt(np.sum(np.square(metrics["leaf_norms"])))
    np.testing.assert_allclose(metrics["grad_norm"], norms, rtol=1e-6)
    for name, x in named(session.eval_params(state)).items():
        assert np.array_equal(x, start[name]) == bool(re.search("^embedding|kernel$", name)), name


def test_lora_rejects_invalid_rules(refuses):
    with refuses("lora.rule: 'nothing' matches no parameter; names are like embedding/table"):
        make_session(tuned(LoRA(rule="nothing"))).optimizer  # noqa: B018
    with refuses("lora.rule: 'norm' matches", "which is not a matrix"):
        make_session(tuned(LoRA(rule="norm"))).optimizer  # noqa: B018
    with refuses("lora.full: 'nothing' matches no parameter"):
        make_session(tuned(LoRA(full="nothing"))).optimizer  # noqa: B018
    with refuses("lora.rule: '(' is not a regular expression"):
        LoRA(rule="(")
    with pytest.raises(ValueError, match="rank"):
        LoRA(rank=0)
    with refuses("leaves nothing to train"):
        make_session(make_experiment(optimizer=AdamW(rules=(Rule("", learning_rate=0.0),)))).optimizer  # noqa: B018
