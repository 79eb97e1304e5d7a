"""Greedy generation and beam search equal transformers for prompts of unequal length."""

import jax
import numpy as np
import pytest

from attnlab.generation import PowerLengthPenalty, prefill
from tests.generation.models import assert_same, padded, search, until_end
from tests.pretrained.test_decoders import CASES, decoder

pytestmark = pytest.mark.parity

STEPS, EOS = 32, 2
ATTENTION = ("gpt2", "llama 3", "mistral", "qwen3", "gemma2", "gemma3", "olmo2", "phi3")
PROMPTS = [np.random.default_rng(n).integers(3, 67, n).tolist() for n in (5, 9, 2, 7)]


def generate(imported, **options):
    """Return the tokens that transformers generates after the prompts, and its full output."""
    import torch

    tokens, segments = padded(PROMPTS)
    output = imported.hf_model.generate(
        torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(segments),
        do_sample=False,
        max_new_tokens=STEPS,
        pad_token_id=EOS,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    return output.sequences[:, tokens.shape[1] :].tolist(), output


@pytest.mark.parametrize("case", ATTENTION)
def test_greedy_generation(case, tmp_path):
    assert case in CASES
    imported = decoder(case, tmp_path)
    # Without an end token, all texts have 32 tokens.
    imported.hf_model.generation_config.eos_token_id = None
    expected, _ = generate(imported)
    tokens, segments = padded(PROMPTS)
    got = []
    with jax.set_mesh(imported.mesh):
        decode = jax.jit(lambda prefix, params, new: prefix.decode(imported.model, params, new))
        prefix = prefill(imported.model, tokens.shape[1] + STEPS, imported.params, tokens, segments)
        for _ in range(STEPS):
            got.append(np.asarray(prefix.logits).argmax(-1))
            prefix = decode(prefix, imported.params, got[-1])
    assert np.transpose(got).tolist() == expected


@pytest.mark.parametrize("alpha", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_beam_search(case, alpha, tmp_path):
    imported = decoder(case, tmp_path)
    for count in (2, 5):
        options = {"num_beams": count, "num_return_sequences": count, "length_penalty": alpha}
        expected, output = generate(imported, early_stopping=False, eos_token_id=EOS, **options)
        scores = output.sequences_scores.reshape(-1, count).tolist()
        with jax.set_mesh(imported.mesh):
            got = search(
                imported.model, imported.params, PROMPTS, STEPS, count, PowerLengthPenalty(alpha), EOS
            )
        for i, (actual, wanted) in enumerate(zip(got, scores, strict=True)):
            texts = [until_end(text, EOS) for text in expected[i * count : (i + 1) * count]]
            assert_same(actual, [*zip(texts, wanted, strict=True)])
