"""transformers captioners with random weights: GPT-2 with cross-attention to ViT or DeiT."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.generation import PowerLengthPenalty, beam_search, prefill
from attnlab.inspect.maps import in_order
from attnlab.pretrained.families import FAMILIES
from attnlab.pretrained.hf_config import HFConfig
from tests.generation.models import assert_same, until_end
from tests.pretrained.hf_models import (
    assert_close,
    assert_export_roundtrip,
    batch,
    positions_of,
    save_and_import,
    saved_gradients,
)

pytestmark = pytest.mark.parity

VISION = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
TEXT = {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
CASES = {  # with a projection; or without, with untied embeddings and an odd depth
    "vit": ("ViT", VISION | {"hidden_size": 16, "image_size": 8}, TEXT),
    "deit, same width": (
        "DeiT",
        VISION | {"hidden_size": 32, "image_size": [8, 12], "num_channels": 1},
        TEXT | {"n_layer": 3, "tie_word_embeddings": False, "activation_function": "relu"},
    ),
}
STEPS, EOS = 32, 2


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    transformers = pytest.importorskip("transformers")

    def make(case):
        encoder, vision, text = CASES[case]
        halves = getattr(transformers, f"{encoder}Config")(**vision), transformers.GPT2Config(**text)
        config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            *halves, decoder_start_token_id=1, pad_token_id=0
        )
        config._attn_implementation = "eager"
        config.encoder._attn_implementation = config.decoder._attn_implementation = "eager"
        model = transformers.VisionEncoderDecoderModel(config=config)
        return save_and_import(model, tmp_path_factory.mktemp("imported"))

    return cache(make)


def inputs(imported):
    """Return tokens (B, T), their mask (B, T) and images (B, height, width, channels)."""
    rng = np.random.default_rng(2)
    return *batch(67), rng.normal(size=(2, *imported.config.source_shape)).astype(np.float32)


def hf_inputs(ids, valid, pixels):
    torch = pytest.importorskip("torch")
    return {
        "pixel_values": torch.tensor(pixels.transpose(0, 3, 1, 2)),
        "decoder_input_ids": torch.tensor(ids),
        "decoder_attention_mask": torch.tensor(valid),
    }


def outputs(model, ids, valid, positions, pixels):
    hidden = model.hidden(ids, valid, positions, source=pixels)
    return hidden, model.decoder.logits_of(hidden)


@pytest.mark.parametrize("case", CASES)
def test_logits_hidden_states_and_maps(imported, case):
    torch = pytest.importorskip("torch")
    imported = imported(case)
    ids, valid, pixels = inputs(imported)
    with torch.no_grad():
        expected = imported.hf_model(
            **hf_inputs(ids, valid, pixels), output_hidden_states=True, output_attentions=True
        )
    with jax.set_mesh(imported.mesh):
        run = jax.jit(partial(imported.model.apply, method=outputs, mutable=["intermediates"]))
        results, captured = run({"params": imported.params}, ids, valid, positions_of(valid), pixels)
    hidden, logits = map(np.asarray, results)
    real, captured = valid.astype(bool), captured["intermediates"]
    assert_close(logits[real], expected.logits[real])
    states = [*in_order(captured["decoder"]["layers"], "hidden"), hidden]
    for actual, wanted in zip(states, expected.decoder_hidden_states, strict=True):
        assert_close(np.asarray(actual)[real], wanted[real])
    for half, branch, wanted in (
        ("encoder", "attention", expected.encoder_attentions),
        ("decoder", "attention", expected.decoder_attentions),
        ("decoder", "cross_attention", expected.cross_attentions),
    ):
        maps = np.asarray(in_order(captured[half]["layers"], branch, "attention_weights"))
        rows = (slice(None),) if half == "encoder" else (real.nonzero()[0], slice(None), real.nonzero()[1])
        for actual, layer in zip(maps, wanted, strict=True):
            assert_close(actual[rows], layer.numpy()[rows])
    for actual, wanted in zip(
        in_order(captured["encoder"]["layers"], "hidden"), expected.encoder_hidden_states, strict=False
    ):
        assert_close(actual, wanted)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(imported, case, tmp_path):
    torch = pytest.importorskip("torch")
    imported = imported(case)
    ids, valid, pixels = inputs(imported)
    targets, weights = np.roll(ids, -1, axis=1), np.roll(valid, -1, axis=1)
    weights[:, -1] = 0
    imported.hf_model.zero_grad()
    labels = torch.tensor(np.where(weights, targets, -100))
    loss = imported.hf_model(**hf_inputs(ids, valid, pixels), labels=labels).loss
    loss.backward()
    for p in imported.hf_model.parameters():  # the pooler is unused
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad

    def loss_fn(params):
        inputs = map(jnp.asarray, (ids, targets, valid, positions_of(valid)))
        s = imported.model.apply({"params": params}, *inputs, source=jnp.asarray(pixels), method="loss_terms")
        return jnp.sum((s.lse - s.target_logit) * weights) / weights.sum()

    with jax.set_mesh(imported.mesh):
        value, grads = jax.jit(jax.value_and_grad(loss_fn))(imported.params)
    assert_close(value, loss.detach(), 1e-5)
    wanted, actual = saved_gradients(imported.hf_model, tmp_path), imported.named(grads)
    assert actual.keys() == wanted.keys()
    for name, grad in actual.items():
        # A bias of the keys alone has no gradient except for rounding.
        bound = 1e-6 if name.endswith("key.bias") else 1e-3 * np.abs(wanted[name]).max()
        np.testing.assert_allclose(grad, wanted[name], rtol=1e-3, atol=bound, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_export_reproduces_checkpoint(imported, case, tmp_path):
    assert_export_roundtrip(imported(case), tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_greedy_generation_and_beam_search(imported, case):
    torch = pytest.importorskip("torch")
    imported = imported(case)
    _, _, pixels = inputs(imported)
    start = imported.config.generation.decoder_start_token_id
    assert start == 1

    def generate(**options):
        return imported.hf_model.generate(
            torch.tensor(pixels.transpose(0, 3, 1, 2)),
            decoder_start_token_id=start,
            do_sample=False,
            max_new_tokens=STEPS,
            pad_token_id=EOS,
            **options,
        )

    with jax.set_mesh(imported.mesh):
        prompt = jnp.full((2, 1), start, jnp.int32)
        prefix = first = prefill(
            imported.model, 1 + STEPS, imported.params, prompt, jnp.ones_like(prompt), source=pixels
        )
        decode, got = jax.jit(lambda prefix, params, new: prefix.decode(imported.model, params, new)), []
        for _ in range(STEPS):
            got.append(np.asarray(prefix.logits).argmax(-1))
            prefix = decode(prefix, imported.params, got[-1])
        hypotheses = beam_search(
            imported.model,
            imported.params,
            first,
            num_beams=3,
            length_penalty=PowerLengthPenalty(),
            eos_ids=(EOS,),
            slots=STEPS,
            steps=STEPS,
        )
    imported.hf_model.generation_config.eos_token_id = None
    assert np.transpose(got).tolist() == generate()[:, 1:].tolist()
    expected = generate(
        num_beams=3,
        num_return_sequences=3,
        early_stopping=False,
        eos_token_id=EOS,
        return_dict_in_generate=True,
        output_scores=True,
    )
    texts, scores = expected.sequences[:, 1:].tolist(), expected.sequences_scores.tolist()
    for i in range(2):
        wanted = [(until_end(t, EOS), s) for t, s in zip(texts, scores, strict=True)][3 * i : 3 * i + 3]
        tokens, log_probs = (np.asarray(x[i]).tolist() for x in (hypotheses.tokens, hypotheses.scores))
        assert_same([(until_end(t, EOS), s) for t, s in zip(tokens, log_probs, strict=True)], wanted)


def test_unsupported_encoder_is_rejected(refuses):
    fields = {"encoder": {"model_type": "swin"}, "decoder": {"model_type": "gpt2"}}
    with refuses("config.json: encoder", "model_type='swin'", "'vit'"):
        FAMILIES["vision-encoder-decoder"].config(HFConfig(fields, "config.json"))
