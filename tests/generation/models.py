"""Small decoders with weights so large that the next token is decided, and varied."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.generation import PowerLengthPenalty, beam_search, prefill
from attnlab.layers import AttentionConfig, Causal, Sliding
from attnlab.models import DecoderConfig

# Three layers of a pattern of two: one period is scanned over, and a tail comes after it.
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
    """A model of this config, and its parameters."""
    model, rng = config.build(vocab_size), np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]

    def draw(path, x):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + scale * rng.normal(size=x.shape), x.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


@partial(jax.jit, static_argnums=0)
def _forward(model, params, tokens):
    return model.apply({"params": params}, tokens)


def next_log_probs(model, params, texts, room=16):
    """log p(next token | text) of each text, float64 (N, V), by a forward pass over the whole of it."""
    tokens = np.zeros((len(texts), room), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    logits = np.asarray(_forward(model, params, jnp.asarray(tokens)), np.float64)
    logits = logits[np.arange(len(texts)), [len(text) - 1 for text in texts]]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def padded(prompts):
    """Prompts padded on the left: tokens and segments."""
    length = max(map(len, prompts))
    tokens = np.array([[0] * (length - len(p)) + list(p) for p in prompts], np.int32)
    segments = np.array([[0] * (length - len(p)) + [1] * len(p) for p in prompts], np.int32)
    return tokens, segments


MEAN = PowerLengthPenalty()


def search(model, params, prompts, steps, num_beams, length_penalty=MEAN, eos_id=EOS):
    """Texts up to and with their end, and scores, of each prompt."""
    tokens, segments = padded(prompts)
    decode_state = prefill(model, tokens.shape[1] + steps, params, tokens, segments)
    found = beam_search(
        model,
        params,
        decode_state,
        num_beams=num_beams,
        length_penalty=length_penalty,
        eos_id=eos_id,
        slots=steps,
        steps=steps,
    )
    return [
        [(until_end(text, eos_id), s) for text, s in zip(texts.tolist(), scores.tolist(), strict=True)]
        for texts, scores in zip(np.asarray(found.tokens), np.asarray(found.scores), strict=True)
    ]


def until_end(text, eos_id=EOS):
    return text[: text.index(eos_id) + 1] if eos_id in text else text


def assert_same(got, expected):
    assert [text for text, _ in got] == [text for text, _ in expected]
    np.testing.assert_allclose([s for _, s in got], [s for _, s in expected], rtol=2e-5)
