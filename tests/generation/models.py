"""Small decoders with large random weights, so that greedy tokens are unambiguous and vary."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.generation import PowerLengthPenalty, beam_search, prefill
from attnlab.layers import AttentionConfig, Causal, Sliding
from attnlab.models import DecoderConfig

# Three layers with a pattern of two: one scanned period and one remainder layer.
WINDOWED = DecoderConfig(
    depth=3,
    width=16,
    attention=AttentionConfig(heads=4, kv_heads=2),
    pattern=(Sliding(4), Causal()),
    tied=False,
)
EOS = 0


@cache
def start(config, vocab_size, seed=0, scale=0.3):
    """Build a model of this config and draw its parameters."""
    model, rng = config.build(vocab_size), np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]

    def draw(path, x):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + scale * rng.normal(size=x.shape), x.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


@partial(jax.jit, static_argnums=0)
def _forward(model, params, tokens):
    return model.apply({"params": params}, tokens)


def next_log_probs(model, params, texts, length=16):
    """Return log p(next token | text) of each text, (N, V) float64, by full forward passes."""
    tokens = np.zeros((len(texts), length), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    logits = np.asarray(_forward(model, params, jnp.asarray(tokens)), np.float64)
    logits = logits[np.arange(len(texts)), [len(text) - 1 for text in texts]]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def padded(prompts):
    """Return the tokens and segments of left-padded prompts."""
    length = max(map(len, prompts))
    tokens = np.array([[0] * (length - len(p)) + list(p) for p in prompts], np.int32)
    segments = np.array([[0] * (length - len(p)) + [1] * len(p) for p in prompts], np.int32)
    return tokens, segments


MEAN = PowerLengthPenalty()


def search(model, params, prompts, steps, num_beams, length_penalty=MEAN, *eos_ids):
    """Return the beam search texts of each prompt, up to an end token, with their scores."""
    eos_ids = eos_ids or (EOS,)
    tokens, segments = padded(prompts)
    decode_state = prefill(model, tokens.shape[1] + steps, params, tokens, segments)
    hypotheses = beam_search(
        model,
        params,
        decode_state,
        num_beams=num_beams,
        length_penalty=length_penalty,
        eos_ids=eos_ids,
        slots=steps,
        steps=steps,
    )
    return [
        [(until_end(text, *eos_ids), s) for text, s in zip(texts.tolist(), scores.tolist(), strict=True)]
        for texts, scores in zip(np.asarray(hypotheses.tokens), np.asarray(hypotheses.scores), strict=True)
    ]


def until_end(text, *eos_ids):
    """Return the text up to and including its first end token."""
    end = next((i for i, token in enumerate(text) if token in (eos_ids or (EOS,))), len(text))
    return text[: end + 1]


def assert_same(got, expected):
    assert [text for text, _ in got] == [text for text, _ in expected]
    np.testing.assert_allclose([s for _, s in got], [s for _, s in expected], rtol=2e-5)
