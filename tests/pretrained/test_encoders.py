"""transformers encoders with random weights and each head: outputs, gradients and export."""

from functools import cache, cached_property

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.inspect.maps import in_order
from tests.pretrained.hf_models import (
    Imported,
    assert_close,
    assert_export_roundtrip,
    batch,
    positions_of,
    random_weights,
    saved_gradients,
)

pytestmark = pytest.mark.parity

SMALL = {
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "type_vocab_size": 3,
    "pad_token_id": 0,
    "num_labels": 3,
}
DISTIL = {
    "vocab_size": 67,
    "dim": 16,
    "hidden_dim": 24,
    "n_layers": 2,
    "n_heads": 2,
    "max_position_embeddings": 16,
    "num_labels": 3,
}
MODERN = {k: v for k, v in SMALL.items() if k != "type_vocab_size"} | {
    "num_hidden_layers": 3,
    "local_attention": 4,
}
ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
PADDED = {"pad_token_id": 1, "max_position_embeddings": 18}
LM, DOCUMENTS, TOKENS = "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"
CASES = {
    "bert": ("Bert", "Model", SMALL),
    "bert, words": ("Bert", LM, SMALL | {"hidden_act": "gelu_new"}),
    "bert, documents": ("Bert", DOCUMENTS, SMALL),
    "bert, tokens": ("Bert", TOKENS, SMALL),
    "roberta, words": ("Roberta", LM, SMALL | PADDED | {"hidden_act": "relu"}),
    "roberta, documents": ("Roberta", DOCUMENTS, SMALL | PADDED | {"type_vocab_size": 1}),
    "xlm-roberta, tokens": ("XLMRoberta", TOKENS, SMALL | PADDED),
    "camembert": ("Camembert", "Model", SMALL | PADDED),
    "electra, words": ("Electra", LM, SMALL | {"embedding_size": 8}),
    "electra, documents": ("Electra", DOCUMENTS, SMALL | {"embedding_size": 16}),
    "albert, words": ("Albert", LM, SMALL | {"embedding_size": 8, "num_hidden_layers": 3}),
    "albert, groups, documents": (
        "Albert",
        DOCUMENTS,
        SMALL | {"embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2},
    ),
    "distilbert": ("DistilBert", "Model", DISTIL),
    "distilbert, words, untied": ("DistilBert", LM, DISTIL | {"tie_word_embeddings": False}),
    "distilbert, documents": ("DistilBert", DOCUMENTS, DISTIL),
    "modernbert, words": ("ModernBert", LM, MODERN | {"num_hidden_layers": 5}),
    "modernbert, biases, words, untied": (
        "ModernBert",
        LM,
        MODERN | {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True, "decoder_bias": False, "tie_word_embeddings": False, "rope_parameters": ROPE},
    ),
    "modernbert, mean, documents": ("ModernBert", DOCUMENTS, MODERN | {"classifier_pooling": "mean", "num_hidden_layers": 4}),
    "modernbert, tokens": ("ModernBert", TOKENS, MODERN | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
}  # fmt: skip


class Encoder(Imported):
    """An imported encoder with a jitted function that returns all outputs."""

    @cached_property
    def run(self):
        def run(params, ids, valid, positions, types):
            inputs, options = ({"params": params}, ids, valid, positions), {"token_types": types}
            capture = {
                "mutable": ["intermediates"],
                "capture_intermediates": lambda _, name: name == "hidden",
            }
            logits, captured = self.model.apply(*inputs, **options, **capture)
            sown = captured["intermediates"]
            maps = in_order(sown["layers"], "attention", "attention_weights")
            return logits, sown["hidden"][0], in_order(sown["layers"], "hidden"), maps

        return jax.jit(run)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    transformers = pytest.importorskip("transformers")

    @cache
    def make(case):
        family, head, settings = CASES[case]
        config = getattr(transformers, f"{family}Config")(**settings)
        config._attn_implementation = "eager"
        folder = tmp_path_factory.mktemp("imported")
        model = random_weights(getattr(transformers, f"{family}{head}")(config))
        model.save_pretrained(folder)
        return Encoder(model, folder)

    return make


def inputs(case, left=False):
    """Return tokens, mask, positions and token types (or None) of rows of unequal lengths."""
    ids, valid = batch(67, left=left)
    types = np.random.default_rng(5).integers(0, CASES[case][2].get("type_vocab_size", 1), ids.shape)
    return ids, valid, positions_of(valid), types if "type_vocab_size" in CASES[case][2] else None


def hf_outputs(imported, ids, valid, positions, types, **options):
    """Return the outputs of transformers; RoBERTa-like models count positions from an offset."""
    torch = pytest.importorskip("torch")
    config = imported.hf_model.config
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions = positions + config.pad_token_id + 1
    named = {"token_type_ids": torch.tensor(types)} if types is not None else {}
    ids, mask, positions = map(torch.tensor, (ids, valid, positions))
    return imported.hf_model(ids, attention_mask=mask, position_ids=positions, **named, **options)


def outputs(imported, *arrays):
    """Return logits, final hidden states, the inputs of each layer and attention maps."""
    with jax.set_mesh(imported.mesh):
        return jax.tree.map(np.asarray, imported.run(imported.params, *jax.tree.map(jnp.asarray, arrays)))


def first(valid):
    """Return the index of the first valid token of each row."""
    return np.arange(len(valid)), valid.argmax(1)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("case", CASES)
def test_logits_hidden_states_and_maps(imported, case, left):
    torch = pytest.importorskip("torch")
    imported, head = imported(case), CASES[case][1]
    given = inputs(case, left)
    real = given[1].astype(bool)
    got, hidden, before, maps = outputs(imported, *given)
    with torch.no_grad():
        expected = hf_outputs(imported, *given, output_hidden_states=True, output_attentions=True)
    for actual, wanted in zip([*before, hidden], expected.hidden_states, strict=True):
        assert_close(actual[real], wanted.numpy()[real])
    for actual, wanted in zip(maps, expected.attentions, strict=True):
        rows = np.broadcast_to(real[:, None, :], actual.shape[:-1])
        assert_close(actual[rows], wanted.numpy()[rows])
    if head == "Model":
        assert_close(hidden[real], expected.last_hidden_state.numpy()[real])
        pooled = expected.get("pooler_output", expected.last_hidden_state[:, 0])
        if not left:  # transformers pools the first token even if it is padding
            assert_close(got[first(given[1])], pooled.numpy())
    elif head == DOCUMENTS:
        if not left or imported.hf_model.config.to_dict().get("classifier_pooling") == "mean":
            assert_close(got[first(given[1])], expected.logits.numpy())
            assert (got[real] == np.repeat(got[first(given[1])], given[1].sum(1), axis=0)).all()
    else:
        assert_close(got[real], expected.logits.numpy()[real])


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][1] != "Model" and "xlm" not in case])
def test_loss_and_gradients(imported, case, tmp_path):
    torch = pytest.importorskip("torch")
    imported, head = imported(case), CASES[case][1]
    given = inputs(case)
    valid = given[1]
    targets = np.random.default_rng(7).integers(0, 67 if head == LM else 3, valid.shape)
    weights = valid.copy()
    if head == DOCUMENTS:
        weights = np.zeros_like(valid)
        weights[first(valid)] = 1
        labels = torch.tensor(targets[first(valid)])
    else:
        weights[:, ::3] = 0
        labels = torch.tensor(np.where(weights, targets, -100))
    imported.hf_model.zero_grad()
    loss = hf_outputs(imported, *given, labels=labels).loss
    loss.backward()

    def objective(params):
        ids, valid, positions, types = jax.tree.map(jnp.asarray, given)
        options = {"token_types": types, "method": "loss_terms"}
        s = imported.model.apply({"params": params}, ids, jnp.asarray(targets), valid, positions, **options)
        return jnp.sum((s.lse - s.target_logit) * weights) / weights.sum()

    with jax.set_mesh(imported.mesh):
        value, grads = jax.jit(jax.value_and_grad(objective))(imported.params)
    assert_close(value, loss.detach().numpy(), 1e-5)
    wanted, actual = saved_gradients(imported.hf_model, tmp_path), imported.named(grads)
    assert actual.keys() == wanted.keys()
    for name, grad in actual.items():
        # A bias of the keys alone has no gradient except for rounding.
        bound = 1e-8 if "key.bias" in name or "k_lin.bias" in name else 1e-3 * np.abs(wanted[name]).max()
        np.testing.assert_allclose(grad, wanted[name], rtol=1e-3, atol=bound, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_export_reproduces_checkpoint(imported, case, tmp_path):
    assert_export_roundtrip(imported(case), tmp_path)
