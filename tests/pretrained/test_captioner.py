"""Captioners of transformers with random weights: an encoder of images, and GPT-2 that looks at it."""

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
    assert_written_again,
    batch,
    close,
    positions_of,
    saved,
    saved_gradients,
)

pytestmark = pytest.mark.parity

VISION = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
TEXT = {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
CASES = {  # a map between widths; or none, other pixels, a table of logits of its own, an odd depth
    "vit": ("ViT", VISION | {"hidden_size": 16, "image_size": 8}, TEXT),
    "deit, as wide": (
        "DeiT",
        VISION | {"hidden_size": 32, "image_size": [8, 12], "num_channels": 1},
        TEXT | {"n_layer": 3, "tie_word_embeddings": False, "activation_function": "relu"},
    ),
}
STEPS, EOS = 32, 2


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
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
        return saved(model, tmp_path_factory.mktemp("peer"))

    return cache(make)


def inputs(peer):
    """Tokens (B, T), which of them are there, and images (B, height, width, channels)."""
    rng = np.random.default_rng(2)
    return *batch(67), rng.normal(size=(2, *peer.config.source_shape)).astype(np.float32)


def for_torch(ids, there, pixels):
    torch = pytest.importorskip("torch")
    return {
        "pixel_values": torch.tensor(pixels.transpose(0, 3, 1, 2)),
        "decoder_input_ids": torch.tensor(ids),
        "decoder_attention_mask": torch.tensor(there),
    }


def outputs(model, ids, there, positions, pixels):
    hidden, _ = model.hidden(ids, there, positions, source=pixels)
    return hidden, model.decoder.logits_of(hidden)


@pytest.mark.parametrize("case", CASES)
def test_logits_hidden_states_and_maps(peer, case):
    torch = pytest.importorskip("torch")
    peer = peer(case)
    ids, there, pixels = inputs(peer)
    with torch.no_grad():
        expected = peer.hf_model(
            **for_torch(ids, there, pixels), output_hidden_states=True, output_attentions=True
        )
    with jax.set_mesh(peer.mesh):
        run = jax.jit(partial(peer.model.apply, method=outputs, mutable=["intermediates"]))
        found, captured = run({"params": peer.params}, ids, there, positions_of(there), pixels)
    hidden, logits = map(np.asarray, found)
    real, captured = there.astype(bool), captured["intermediates"]
    close(logits[real], expected.logits[real])
    states = [*in_order(captured["decoder"]["layers"], "hidden"), hidden]
    for ours, wanted in zip(states, expected.decoder_hidden_states, strict=True):
        close(np.asarray(ours)[real], wanted[real])
    for half, branch, wanted in (
        ("encoder", "attention", expected.encoder_attentions),
        ("decoder", "attention", expected.decoder_attentions),
        ("decoder", "cross_attention", expected.cross_attentions),
    ):
        maps = np.asarray(in_order(captured[half]["layers"], branch, "attention_weights"))
        rows = (slice(None),) if half == "encoder" else (real.nonzero()[0], slice(None), real.nonzero()[1])
        for ours, theirs in zip(maps, wanted, strict=True):
            close(ours[rows], theirs.numpy()[rows])
    for ours, wanted in zip(
        in_order(captured["encoder"]["layers"], "hidden"), expected.encoder_hidden_states, strict=False
    ):
        close(ours, wanted)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(peer, case, tmp_path):
    torch = pytest.importorskip("torch")
    peer = peer(case)
    ids, there, pixels = inputs(peer)
    targets, weights = np.roll(ids, -1, axis=1), np.roll(there, -1, axis=1)
    weights[:, -1] = 0
    peer.hf_model.zero_grad()
    labels = torch.tensor(np.where(weights, targets, -100))
    loss = peer.hf_model(**for_torch(ids, there, pixels), labels=labels).loss
    loss.backward()
    for p in peer.hf_model.parameters():  # of what pools, which no one reads
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad

    def ours(params):
        given = map(jnp.asarray, (ids, targets, there, positions_of(there)))
        s = peer.model.apply({"params": params}, *given, source=jnp.asarray(pixels), method="loss_terms")
        return jnp.sum((s.lse - s.target_logit) * weights) / weights.sum()

    with jax.set_mesh(peer.mesh):
        value, grads = jax.jit(jax.value_and_grad(ours))(peer.params)
    close(value, loss.detach(), 1e-5)
    wanted, found = saved_gradients(peer.hf_model, tmp_path), peer.named(grads)
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        # A bias of the keys alone has no gradient, but for rounding.
        bound = 1e-6 if name.endswith("key.bias") else 1e-3 * np.abs(wanted[name]).max()
        np.testing.assert_allclose(grad, wanted[name], rtol=1e-3, atol=bound, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_written_again_it_is_the_same(peer, case, tmp_path):
    assert_written_again(peer(case), tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_greedy_and_beams(peer, case):
    torch = pytest.importorskip("torch")
    peer = peer(case)
    _, _, pixels = inputs(peer)
    start = peer.config.generation.decoder_start_token_id
    assert start == 1

    def generate(**options):
        return peer.hf_model.generate(
            torch.tensor(pixels.transpose(0, 3, 1, 2)),
            decoder_start_token_id=start,
            do_sample=False,
            max_new_tokens=STEPS,
            pad_token_id=EOS,
            **options,
        )

    with jax.set_mesh(peer.mesh):
        begun = jnp.full((2, 1), start, jnp.int32)
        prefix = first = prefill(
            peer.model, 1 + STEPS, peer.params, begun, jnp.ones_like(begun), source=pixels
        )
        read, got = jax.jit(lambda prefix, params, new: prefix.read(peer.model, params, new)), []
        for _ in range(STEPS):
            got.append(np.asarray(prefix.logits).argmax(-1))
            prefix = read(prefix, peer.params, got[-1])
        found = beam_search(
            peer.model,
            peer.params,
            first,
            num_beams=3,
            length_penalty=PowerLengthPenalty(),
            eos_id=EOS,
            slots=STEPS,
            steps=STEPS,
        )
    peer.hf_model.generation_config.eos_token_id = None
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
        ours = zip(np.asarray(found.tokens[i]).tolist(), np.asarray(found.scores[i]).tolist(), strict=True)
        assert_same([(until_end(t, EOS), s) for t, s in ours], wanted)


def test_what_is_not_here_is_refused(refuses):
    said = {"encoder": {"model_type": "swin"}, "decoder": {"model_type": "gpt2"}}
    with refuses("config.json: encoder", "model_type='swin'", "'vit'"):
        FAMILIES["vision-encoder-decoder"].config(HFConfig(said, "config.json"))
