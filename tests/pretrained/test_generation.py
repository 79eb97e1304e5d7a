"""Greedy generation and beam search equal transformers for prompts of unequal length."""

import jax
import numpy as np
import pytest

from attnlab import sharding
from attnlab.data import BPE
from attnlab.generation import (
    BeamSearchOptions,
    Generator,
    PowerLengthPenalty,
    PromptLookup,
    SamplingParams,
    prefill,
)
from attnlab.pretrained import load
from tests.generation.models import assert_same, padded, search, until_end
from tests.pretrained.hf_models import random_weights
from tests.pretrained.small_llama import TEXTS
from tests.pretrained.test_decoders import CASES, SMALL, decoder

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


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A Llama whose `generation_config.json` lists further end tokens, which its texts reach."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("chat")
    config = transformers.LlamaConfig(**SMALL | {"vocab_size": 300, "num_hidden_layers": 2})
    hf_model = random_weights(transformers.LlamaForCausalLM(config))
    tokenizer = BPE(vocab_size=290).train(TEXTS)
    ids = torch.tensor([tokenizer.encode_prompt("the cat")])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": STEPS, "do_sample": False}
    options["pad_token_id"] = 0
    texts = [hf_model.generate(ids, num_beams=n, **options)[0, ids.shape[1] :].tolist() for n in (1, 4)]
    ends = [next(token for token in text[5:] if token not in text[:5]) for text in texts]
    hf_model.generation_config.eos_token_id = [tokenizer.eos_id, *ends]
    hf_model.save_pretrained(folder)
    tokenizer.with_hf_settings().save(folder / "tokenizer.json")
    return folder, hf_model, ids, options


@pytest.mark.parametrize("speculator", [None, PromptLookup()], ids=["plain", "speculative"])
def test_greedy_generation_ends_at_each_listed_token(chat, speculator):
    folder, hf_model, ids, options = chat
    expected = hf_model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    assert len(expected) < STEPS
    generator, pieces = load_generator(folder), []
    (row,) = generator(
        ["the cat"],
        max_new_tokens=STEPS,
        sampling=SamplingParams(0.0),
        speculator=speculator,
        stream=lambda _, text: pieces.append(text),
    )
    assert (row.tokens, row.finish_reason) == (expected[:-1], "eos")
    assert "".join(pieces) == row.text == generator.tokenizer.decode(expected[:-1])


def test_beam_search_ends_at_each_listed_token(chat):
    folder, hf_model, ids, options = chat
    beams = {"num_beams": 4, "num_return_sequences": 4, "early_stopping": False}
    expected = hf_model.generate(ids, **options, **beams)[:, ids.shape[1] :].tolist()
    generator = load_generator(folder)
    rows = generator.beam_search(["the cat"], BeamSearchOptions(4), max_new_tokens=STEPS, num_samples=4)
    ends = hf_model.generation_config.eos_token_id
    assert [row.tokens for row in rows] == [
        until_end(text, *ends)[:-1] if set(ends) & set(text) else text for text in expected
    ]
    assert "eos" in {row.finish_reason for row in rows}


def load_generator(folder):
    mesh = sharding.make_mesh(sharding.parse_mesh("single", 1))
    model, params, tokenizer = load(str(folder), mesh)
    return Generator(model, params, tokenizer, 64, mesh)
