"""Encoders of transformers with random weights and each of their heads: read, compared and written again."""

from functools import cache, cached_property

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.inspect.maps import in_order
from tests.pretrained.hf_models import (
    Imported,
    assert_written_again,
    batch,
    close,
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
    """A peer, and all that is computed here of it, by one program."""

    @cached_property
    def run(self):
        def run(params, ids, there, positions, types):
            given, options = ({"params": params}, ids, there, positions), {"token_types": types}
            keep = {"mutable": ["intermediates"], "capture_intermediates": lambda _, name: name == "hidden"}
            logits, captured = self.model.apply(*given, **options, **keep)
            kept = captured["intermediates"]
            maps = in_order(kept["layers"], "attention", "attention_weights")
            return logits, kept["hidden"][0], in_order(kept["layers"], "hidden"), maps

        return jax.jit(run)


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")

    @cache
    def made(case):
        family, head, settings = CASES[case]
        config = getattr(transformers, f"{family}Config")(**settings)
        config._attn_implementation = "eager"
        folder = tmp_path_factory.mktemp("peer")
        model = random_weights(getattr(transformers, f"{family}{head}")(config))
        model.save_pretrained(folder)
        return Encoder(model, folder)

    return made


def inputs(case, left=False):
    """Tokens, which are there, positions, and types (or none) of a batch of unequal rows."""
    ids, there = batch(67, left=left)
    types = np.random.default_rng(5).integers(0, CASES[case][2].get("type_vocab_size", 1), ids.shape)
    return ids, there, positions_of(there), types if "type_vocab_size" in CASES[case][2] else None


def theirs(peer, ids, there, positions, types, **options):
    """What transformers computes; RoBERTa's kin is told positions as it counts them."""
    torch = pytest.importorskip("torch")
    config = peer.hf_model.config
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions = positions + config.pad_token_id + 1
    named = {"token_type_ids": torch.tensor(types)} if types is not None else {}
    ids, mask, positions = map(torch.tensor, (ids, there, positions))
    return peer.hf_model(ids, attention_mask=mask, position_ids=positions, **named, **options)


def ours(peer, *arrays):
    """Logits, hidden states, those before each layer, and maps."""
    with jax.set_mesh(peer.mesh):
        return jax.tree.map(np.asarray, peer.run(peer.params, *jax.tree.map(jnp.asarray, arrays)))


def first(there):
    """The rows, and the first token that is there in each."""
    return np.arange(len(there)), there.argmax(1)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("case", CASES)
def test_logits_hidden_states_and_maps(peer, case, left):
    torch = pytest.importorskip("torch")
    peer, head = peer(case), CASES[case][1]
    given = inputs(case, left)
    real = given[1].astype(bool)
    got, hidden, before, maps = ours(peer, *given)
    with torch.no_grad():
        expected = theirs(peer, *given, output_hidden_states=True, output_attentions=True)
    for found, wanted in zip([*before, hidden], expected.hidden_states, strict=True):
        close(found[real], wanted.numpy()[real])
    for found, wanted in zip(maps, expected.attentions, strict=True):
        rows = np.broadcast_to(real[:, None, :], found.shape[:-1])
        close(found[rows], wanted.numpy()[rows])
    if head == "Model":
        close(hidden[real], expected.last_hidden_state.numpy()[real])
        pooled = expected.get("pooler_output", expected.last_hidden_state[:, 0])
        if not left:  # transformers pools the first token, though it be padding
            close(got[first(given[1])], pooled.numpy())
    elif head == DOCUMENTS:
        if not left or peer.hf_model.config.to_dict().get("classifier_pooling") == "mean":
            close(got[first(given[1])], expected.logits.numpy())
            assert (got[real] == np.repeat(got[first(given[1])], given[1].sum(1), axis=0)).all()
    else:
        close(got[real], expected.logits.numpy()[real])


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][1] != "Model" and "xlm" not in case])
def test_loss_and_gradients(peer, case, tmp_path):
    torch = pytest.importorskip("torch")
    peer, head = peer(case), CASES[case][1]
    given = inputs(case)
    there = given[1]
    targets = np.random.default_rng(7).integers(0, 67 if head == LM else 3, there.shape)
    weights = there.copy()
    if head == DOCUMENTS:
        weights = np.zeros_like(there)
        weights[first(there)] = 1
        labels = torch.tensor(targets[first(there)])
    else:
        weights[:, ::3] = 0
        labels = torch.tensor(np.where(weights, targets, -100))
    peer.hf_model.zero_grad()
    loss = theirs(peer, *given, labels=labels).loss
    loss.backward()

    def objective(params):
        ids, there, positions, types = jax.tree.map(jnp.asarray, given)
        options = {"token_types": types, "method": "loss_terms"}
        s = peer.model.apply({"params": params}, ids, jnp.asarray(targets), there, positions, **options)
        return jnp.sum((s.lse - s.target_logit) * weights) / weights.sum()

    with jax.set_mesh(peer.mesh):
        value, grads = jax.jit(jax.value_and_grad(objective))(peer.params)
    close(value, loss.detach().numpy(), 1e-5)
    wanted, found = saved_gradients(peer.hf_model, tmp_path), peer.named(grads)
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        # A bias of the keys alone has no gradient, but for rounding.
        bound = 1e-8 if "key.bias" in name or "k_lin.bias" in name else 1e-3 * np.abs(wanted[name]).max()
        np.testing.assert_allclose(grad, wanted[name], rtol=1e-3, atol=bound, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_written_again_it_is_the_same(peer, case, tmp_path):
    assert_written_again(peer(case), tmp_path)
