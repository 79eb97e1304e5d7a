"""transformers Whisper with random weights: outputs, generation and export."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.data import Bytes, preprocessor
from attnlab.data.audio import LogMel
from attnlab.generation import Generator, PowerLengthPenalty, SamplingParams, beam_search, prefill
from attnlab.inspect.maps import in_order
from attnlab.pretrained import load
from attnlab.pretrained.families import FAMILIES
from attnlab.pretrained.hf_config import HFConfig
from tests.generation.models import assert_same, until_end
from tests.pretrained.hf_models import assert_close, assert_export_roundtrip, save_and_import, saved_gradients

pytestmark = pytest.mark.parity

SMALL = {
    "vocab_size": 67,
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "max_target_positions": 40,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "begin_suppress_tokens": None,
}
CASES = {
    "whisper": SMALL,
    "unequal halves, untied": SMALL
    | {"encoder_layers": 3, "decoder_attention_heads": 2, "decoder_ffn_dim": 40, "max_source_positions": 7}
    | {"activation_function": "relu", "tie_word_embeddings": False},
}
STEPS, START, EOS = 32, 3, 2
RNG = np.random.default_rng(0)
LABELS = np.where(np.arange(9) < [[9], [6]], RNG.integers(4, 67, (2, 9)), -100)


@pytest.fixture(scope="module", params=CASES)
def imported(request, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(**CASES[request.param])
    config._attn_implementation = "eager"
    return save_and_import(
        transformers.WhisperForConditionalGeneration(config), tmp_path_factory.mktemp("imported")
    )


def audio_features(imported):
    """Return features (B, frames, mels) of the checkpoint's length, and the same for torch."""
    torch = pytest.importorskip("torch")
    features = np.random.default_rng(1).normal(size=(2, *imported.config.source_shape)).astype(np.float32)
    return jnp.asarray(features), torch.tensor(features.transpose(0, 2, 1))


def test_logits_hidden_states_and_maps(imported):
    torch = pytest.importorskip("torch")
    features, hf_features = audio_features(imported)
    tokens = np.random.default_rng(2).integers(4, 67, (2, 9))
    with torch.no_grad():
        options = {"output_hidden_states": True, "output_attentions": True}
        expected = imported.hf_model(hf_features, decoder_input_ids=torch.tensor(tokens), **options)
    with jax.set_mesh(imported.mesh):
        run = jax.jit(partial(imported.model.apply, mutable=["intermediates"]))
        logits, captured = run({"params": imported.params}, jnp.asarray(tokens), source=features)
    assert_close(logits, expected.logits)
    encoder, decoder = (captured["intermediates"][half]["layers"] for half in ("encoder", "decoder"))
    for layers, branch, maps in [
        (encoder, "attention", expected.encoder_attentions),
        (decoder, "attention", expected.decoder_attentions),
        (decoder, "cross_attention", expected.cross_attentions),
    ]:
        assert_close(in_order(layers, branch, "attention_weights"), torch.stack(maps))
    # The last hidden state of transformers is after the final norm.
    assert_close(in_order(encoder, "hidden"), torch.stack(expected.encoder_hidden_states[:-1]))
    assert_close(in_order(decoder, "hidden"), torch.stack(expected.decoder_hidden_states[:-1]))
    with jax.set_mesh(imported.mesh):
        memory = jax.jit(partial(imported.model.apply, method="encode"))(
            {"params": imported.params}, features
        )
    assert_close(memory.hidden, expected.encoder_last_hidden_state)


def test_loss_and_gradients(imported, tmp_path):
    torch = pytest.importorskip("torch")
    features, hf_features = audio_features(imported)
    imported.hf_model.zero_grad()
    loss = imported.hf_model(hf_features, labels=torch.tensor(LABELS)).loss
    loss.backward()
    frozen = imported.hf_model.model.encoder.embed_positions.weight
    assert frozen.grad is None
    frozen.grad = torch.zeros_like(frozen)
    targets, weights = np.maximum(LABELS, 0), LABELS >= 0
    tokens = np.concatenate([np.full((2, 1), START), targets[:, :-1]], axis=1)

    def loss_fn(params):
        s = imported.model.apply(
            {"params": params}, *map(jnp.asarray, (tokens, targets)), method="loss_terms", source=features
        )
        return jnp.sum((s.lse - s.target_logit) * weights) / weights.sum()

    with jax.set_mesh(imported.mesh):
        value, grads = jax.jit(jax.value_and_grad(loss_fn))(imported.params)
    assert_close(value, loss.detach().numpy(), 1e-5)
    wanted, actual = saved_gradients(imported.hf_model, tmp_path), imported.named(grads)
    assert actual.keys() == wanted.keys()
    for name, grad in actual.items():
        largest = np.abs(wanted[name]).max()
        np.testing.assert_allclose(grad, wanted[name], rtol=1e-3, atol=1e-3 * largest, err_msg=name)


def test_export_reproduces_checkpoint(imported, tmp_path):
    assert_export_roundtrip(imported, tmp_path)


def generate(imported, features, begin, **options):
    """Run the generic `generate`: Whisper overrides it with rules for timestamps and silence."""
    import torch
    from transformers.generation import GenerationConfig, GenerationMixin

    config = GenerationConfig(max_new_tokens=STEPS, pad_token_id=EOS, decoder_start_token_id=START, **options)
    return GenerationMixin.generate(
        imported.hf_model,
        features,
        decoder_input_ids=torch.tensor(begin),
        generation_config=config,
        return_dict_in_generate=True,
        output_scores=True,
    )


def start(imported, features):
    tokens = jnp.array([[START, 5]] * 2)
    valid = jnp.ones(features.shape[:2], jnp.int32)
    return prefill(
        imported.model,
        2 + STEPS,
        imported.params,
        tokens,
        jnp.ones_like(tokens),
        source=features,
        source_segments=valid,
    )


def test_greedy_generation(imported):
    features, hf_features = audio_features(imported)
    expected = generate(imported, hf_features, [[START, 5]] * 2, eos_token_id=None).sequences[:, 2:].tolist()
    got = []
    with jax.set_mesh(imported.mesh):
        decode = jax.jit(lambda prefix, params, new: prefix.decode(imported.model, params, new))
        prefix = start(imported, features)
        for _ in range(STEPS):
            got.append(np.asarray(prefix.logits).argmax(-1))
            prefix = decode(prefix, imported.params, got[-1])
    assert np.transpose(got).tolist() == expected


def test_beam_search(imported):
    features, hf_features = audio_features(imported)
    options = {"num_beams": 3, "num_return_sequences": 3, "early_stopping": False, "eos_token_id": EOS}
    output = generate(imported, hf_features, [[START, 5]] * 2, **options)
    expected = output.sequences[:, 2:].reshape(2, 3, -1).tolist()
    scores = output.sequences_scores.reshape(2, 3).tolist()
    with jax.set_mesh(imported.mesh):
        options = {
            "num_beams": 3,
            "length_penalty": PowerLengthPenalty(1.0),
            "eos_ids": (EOS,),
            "slots": STEPS,
            "steps": STEPS,
        }
        hypotheses = beam_search(imported.model, imported.params, start(imported, features), **options)
    for i in range(2):
        tokens = [until_end(text, EOS) for text in hypotheses.tokens[i].tolist()]
        wanted = [until_end(text, EOS) for text in expected[i]]
        assert_same(
            [*zip(tokens, hypotheses.scores[i].tolist(), strict=True)], [*zip(wanted, scores[i], strict=True)]
        )


def test_language_detection_ends_forced_tokens(imported):
    fields = imported.hf_model.config.to_dict() | {"forced_decoder_ids": [[1, None], [2, 9]]}
    assert FAMILIES["whisper"].config(HFConfig(fields, "config.json")).generation.forced_decoder_ids == ()


def test_transcribe_audio(tmp_path):
    """Audio to text with only the files of the checkpoint."""
    transformers = pytest.importorskip("transformers")
    sizes = {"feature_size": 16, "sampling_rate": 16_000, "hop_length": 160, "chunk_length": 1, "n_fft": 400}
    extractor = transformers.WhisperFeatureExtractor(**sizes)
    tokenizer = Bytes().train([])
    changes = {
        "vocab_size": 257,
        "num_mel_bins": 16,
        "max_source_positions": 50,
        "eos_token_id": tokenizer.eos_id,
    }
    config = transformers.WhisperConfig(**SMALL | changes, forced_decoder_ids=[[1, 5], [2, 9]])
    config._attn_implementation = "eager"
    model = transformers.WhisperForConditionalGeneration(config)
    rules = {
        "suppress_tokens": [199, 212],
        "begin_suppress_tokens": [217, tokenizer.eos_id],
    }
    model.generation_config.update(**rules)
    imported = save_and_import(model, tmp_path)
    extractor.save_pretrained(tmp_path)
    tokenizer.with_hf_settings().save(tmp_path / "tokenizer.json")

    waveform = np.random.default_rng(0).normal(size=12_000).astype(np.float32) * 0.1
    hf_features = extractor(waveform, sampling_rate=16_000, return_tensors="pt").input_features
    expected = generate(imported, hf_features, [[START, 5, 9]], eos_token_id=tokenizer.eos_id, **rules)
    model, params, loaded_tokenizer = load(str(tmp_path), imported.mesh)
    features = LogMel.from_settings(preprocessor.read(tmp_path))(jnp.asarray(waveform)[None])
    assert_close(features[0], hf_features[0].T)
    generator = Generator(
        model, params, loaded_tokenizer, model.config.decoder.positions.length, imported.mesh
    )
    (row,) = generator(sources=[features[0]], sampling=SamplingParams(0.0), max_new_tokens=STEPS + 2)
    assert row.tokens == until_end(expected.sequences[0, 1:].tolist(), tokenizer.eos_id)[: len(row.tokens)]
    assert row.tokens[:2] == [5, 9] and len(row.tokens) > 8
    rules = {name: [] for name in rules}
    free = generate(imported, hf_features, [[START, 5, 9]], eos_token_id=tokenizer.eos_id, **rules)
    assert row.tokens != free.sequences[0, 1:].tolist()[: len(row.tokens)]
