"""transformers encoder-decoders with random weights: outputs, generation and export."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.generation import (
    BeamSearchOptions,
    Generator,
    PowerLengthPenalty,
    SamplingParams,
    beam_search,
    prefill,
)
from attnlab.inspect.maps import in_order
from attnlab.pretrained import import_export, load
from attnlab.pretrained.hf_config import HFConfig
from tests.generation.models import assert_same, until_end
from tests.pretrained.hf_models import (
    Imported,
    assert_close,
    assert_export_roundtrip,
    batch,
    positions_of,
    random_weights,
    saved_gradients,
)
from tests.pretrained.test_tokenizer_files import opus

pytestmark = pytest.mark.parity

VOCAB, STEPS, EOS, START = 61, 32, 2, 1
IDS = {"vocab_size": VOCAB, "pad_token_id": START, "eos_token_id": EOS, "decoder_start_token_id": START}
T5 = IDS | {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
SIZES = {"layers": 2, "ffn_dim": 40, "attention_heads": 4}
BART = IDS | {f"{half}_{name}": n for half in ("encoder", "decoder") for name, n in SIZES.items()}
BART |= {"d_model": 24, "max_position_embeddings": 48, "forced_eos_token_id": None}
CASES = {
    "t5": ("T5", T5),
    "t5, gated, untied, unequal halves": (
        "T5",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6},
    ),
    "t5, tied, unscaled": ("T5", T5 | {"tie_word_embeddings": False}),
    "mt5": ("MT5", T5 | {"feed_forward_proj": "gated-silu"}),
    "bart": ("Bart", BART),
    "bart, scaled, unequal halves": (
        "Bart",
        BART | {"scale_embedding": True, "decoder_layers": 1, "encoder_attention_heads": 3, "decoder_ffn_dim": 16, "activation_function": "relu"},
    ),
    "mbart": ("MBart", BART | {"scale_embedding": True}),
    "marian": ("Marian", BART | {"scale_embedding": True, "activation_function": "swish"}),
    "marian, separate embeddings": ("Marian", BART | {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 57}),
    "pegasus": ("Pegasus", BART),
}  # fmt: skip
SEARCHED = ("t5", "bart", "marian")


def seq2seq(case, folder):
    """Return the `Imported` model of a case."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    family, settings = CASES[case]
    config = getattr(transformers, f"{family}Config")(**settings)
    config._attn_implementation = "eager"
    head = "MTModel" if family == "Marian" else "ForConditionalGeneration"
    model = getattr(transformers, f"{family}{head}")(config)
    if family == "MT5" or "untied" in case:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return save_and_import(model, folder)


def save_and_import(model, folder):
    """Set random weights, except for sinusoidal positions; save the model and return its import."""
    torch = pytest.importorskip("torch")
    random_weights(model)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("embed_positions") and hasattr(module, "create_weight"):
                module.weight.copy_(module.create_weight())
        for buffer in (b for name, b in model.named_buffers() if name == "final_logits_bias"):
            buffer.normal_(generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    return Imported(model, folder)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    def make(case):
        return seq2seq(case, tmp_path_factory.mktemp("imported"))

    return cache(make)


def arrays(targets=VOCAB):
    """Return source and target tokens and their masks, with rows of unequal lengths."""
    source, valid = batch(VOCAB, (9, 6))
    tokens, segments = batch(min(targets, 57), (7, 10), seed=2)
    return {"tokens": tokens, "segment_ids": segments, "positions": positions_of(segments), "source": source, "source_segments": valid}  # fmt: skip


def hf_outputs(imported, **options):
    """Return the outputs of transformers for `arrays`."""
    import torch

    given = {name: torch.tensor(array) for name, array in arrays().items()}
    return imported.hf_model(
        given["source"],
        attention_mask=given["source_segments"],
        decoder_input_ids=given["tokens"],
        decoder_attention_mask=given["segment_ids"],
        **options,
    )


def outputs(imported):
    """Return logits, encoder output, intermediates, loss and gradients, in one jitted call."""
    given = {name: jnp.asarray(array) for name, array in arrays().items()}
    weights = given["segment_ids"]

    def loss(params):
        s = imported.model.apply(
            {"params": params}, **given, targets=jnp.roll(given["tokens"], -1, axis=1), method="loss_terms"
        )
        return jnp.sum((s.lse - s.target_logit) * weights) / weights.sum()

    def run(params):
        logits, captured = imported.model.apply({"params": params}, **given, mutable=["intermediates"])
        source = given["source"], given["source_segments"]
        memory = imported.model.apply({"params": params}, *source, method="encode")
        return logits, memory.hidden, captured["intermediates"], *jax.value_and_grad(loss)(params)

    with jax.set_mesh(imported.mesh):
        return jax.tree.map(np.asarray, jax.jit(run)(imported.params))


@pytest.mark.parametrize("case", CASES)
def test_outputs_loss_and_gradients(imported, case, tmp_path):
    import torch

    imported = imported(case)
    given = arrays()
    logits, memory, captured, value, grads = outputs(imported)
    labels = np.where(given["segment_ids"], np.roll(given["tokens"], -1, axis=1), -100)
    imported.hf_model.zero_grad()
    expected = hf_outputs(
        imported, labels=torch.tensor(labels), output_hidden_states=True, output_attentions=True
    )
    expected.loss.backward()
    expected = {name: value for name, value in expected.items() if name != "cache"}
    real = {"encoder": given["source_segments"] > 0, "decoder": given["segment_ids"] > 0}
    assert_close(logits[real["decoder"]], expected["logits"].detach().numpy()[real["decoder"]])
    for half, valid in real.items():
        hidden = [*in_order(captured[half]["layers"], "hidden"), *([memory] if half == "encoder" else [])]
        wanted = expected[f"{half}_hidden_states"]
        # The last state of the decoder is checked as logits.
        assert len(wanted) == len(hidden) + (half == "decoder")
        for actual, states in zip(hidden, wanted, strict=False):
            assert_close(np.asarray(actual)[valid], states.detach().numpy()[valid])
    for half, branch, name in (
        ("encoder", "attention", "encoder_attentions"),
        ("decoder", "attention", "decoder_attentions"),
        ("decoder", "cross_attention", "cross_attentions"),
    ):
        maps = in_order(captured[half]["layers"], branch, "attention_weights")
        for actual, weights in zip(np.asarray(maps), expected[name], strict=True):
            rows = np.broadcast_to(real[half][:, None, :], actual.shape[:-1])
            assert_close(actual[rows], weights.detach().numpy()[rows])

    assert_close(value, expected["loss"].detach().numpy(), 1e-5)
    actual, wanted = imported.named(grads), saved_gradients(imported.hf_model, tmp_path)
    assert actual.keys() == {name for name in wanted if "embed_positions" not in name or name in actual}
    for name in actual.keys() - {"final_logits_bias"}:  # a buffer in transformers
        # A bias of the keys alone has no gradient except for rounding.
        tolerance = 1e-7 if name.endswith("k_proj.bias") else 1e-3 * np.abs(wanted[name]).max()
        np.testing.assert_allclose(actual[name], wanted[name], rtol=1e-3, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_export_reproduces_checkpoint(imported, case, tmp_path):
    assert_export_roundtrip(imported(case), tmp_path)


def generate(imported, **options):
    """Return the tokens that transformers generates after the start token, and its full output."""
    import torch

    given = arrays()
    source, valid = (torch.tensor(given[name]) for name in ("source", "source_segments"))
    output = imported.hf_model.generate(
        source,
        attention_mask=valid,
        do_sample=False,
        max_new_tokens=STEPS,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    return output.sequences[:, 1:].tolist(), output


def prefix(imported, forced=()):
    """Return the decode state before the first generated token."""
    given, config = arrays(), imported.config
    tokens = np.tile(np.array([config.generation.decoder_start_token_id, *forced], np.int32), (2, 1))
    source = {name: given[name] for name in ("source", "source_segments")}
    return prefill(imported.model, STEPS + 1, imported.params, tokens, np.ones_like(tokens), **source)


@pytest.mark.parametrize("case", ("mt5", *SEARCHED, "mbart", "pegasus"))
def test_greedy_generation(imported, case):
    imported = imported(case)
    imported.hf_model.generation_config.eos_token_id = None  # so that all texts have 32 tokens
    expected, _ = generate(imported)
    imported.hf_model.generation_config.eos_token_id = EOS
    got = []
    with jax.set_mesh(imported.mesh):
        decode = jax.jit(lambda prefix, params, new: prefix.decode(imported.model, params, new))
        state = prefix(imported)
        for _ in range(STEPS):
            got.append(np.asarray(state.logits).argmax(-1))
            state = decode(state, imported.params, got[-1])
    assert np.transpose(got).tolist() == expected


@pytest.mark.parametrize("case", SEARCHED)
def test_beam_search(imported, case):
    imported = imported(case)
    for count, alpha, forced in ((2, 1.0, ()), (5, 0.5, ()), (2, 2.0, (7,))):
        options = {"num_beams": count, "num_return_sequences": count, "length_penalty": alpha}
        expected, output = generate(
            imported, early_stopping=False, forced_bos_token_id=forced[0] if forced else None, **options
        )
        scores = output.sequences_scores.reshape(-1, count).tolist()
        with jax.set_mesh(imported.mesh):
            got = beam_search(
                imported.model, imported.params, prefix(imported, forced), num_beams=count, length_penalty=PowerLengthPenalty(alpha),
                eos_ids=(EOS,), slots=STEPS, steps=STEPS, forced_decoder_ids=forced,
            )  # fmt: skip
        for i, wanted in enumerate(scores):
            texts = [until_end(text, EOS) for text in expected[i * count : (i + 1) * count]]
            tokens = [until_end(text, EOS) for text in np.asarray(got.tokens[i]).tolist()]
            assert_same([*zip(tokens, np.asarray(got.scores[i]).tolist(), strict=True)], [*zip(texts, wanted, strict=True)])  # fmt: skip


@pytest.mark.parametrize(("case", "forced"), [("bart", (7,)), ("marian", ())])
def test_generation_config_is_followed(imported, case, forced, tmp_path):
    """Probabilities are normalized over the tokens that are not suppressed."""
    imported = imported(case)
    free, _ = generate(imported)
    rules = {
        "bad_words_ids": [[START], [EOS]],  # the end token is allowed nevertheless
        "suppress_tokens": sorted({token for text in free for token in text} - {EOS}),
        "begin_suppress_tokens": [EOS, *range(5, 30)],
        "forced_bos_token_id": forced[0] if forced else None,
        "forced_eos_token_id": EOS,
    }
    before = imported.hf_model.generation_config
    imported.hf_model.generation_config = type(before)(**before.to_dict() | rules)
    try:
        imported.hf_model.save_pretrained(tmp_path)
        expected, _ = generate(imported)
        several, output = generate(imported, num_beams=3, num_return_sequences=3, early_stopping=False, renormalize_logits=True)  # fmt: skip
    finally:
        imported.hf_model.generation_config = before
    imported = Imported(imported.hf_model, tmp_path)
    assert imported.config.generation.forced_decoder_ids == forced
    with jax.set_mesh(imported.mesh):
        for count, wanted, scores in ((1, expected, None), (3, several, output.sequences_scores.tolist())):
            options = {
                "slots": STEPS,
                "steps": STEPS,
                "length_penalty": PowerLengthPenalty(1.0),
                "eos_ids": (EOS,),
                "forced_decoder_ids": forced,
            }
            got = beam_search(
                imported.model, imported.params, prefix(imported, forced), num_beams=count, **options
            )
            tokens = [until_end(text, EOS) for text in got.tokens.reshape(-1, STEPS).tolist()]
            assert tokens == [until_end(text, EOS) for text in wanted]
            if scores:
                np.testing.assert_allclose(got.scores.reshape(-1), scores, rtol=2e-5)


def test_opus_folder_translates(tmp_path):
    """Text to text with only the files of the folder."""
    transformers = pytest.importorskip("transformers")
    path = opus(tmp_path)
    tokenizer = transformers.MarianTokenizer.from_pretrained(path)
    pad, size = tokenizer.pad_token_id, len(tokenizer)
    ids = {"vocab_size": size, "pad_token_id": pad, "decoder_start_token_id": pad, "eos_token_id": 0}
    config = transformers.MarianConfig(**CASES["marian"][1] | ids | {"bos_token_id": 0})
    model = transformers.MarianMTModel(config)
    rules = {
        "bad_words_ids": [[pad]],
        "forced_eos_token_id": 0,
        "renormalize_logits": True,
        "max_length": 512,
    }
    model.generation_config.update(**rules)
    mesh = save_and_import(model, path).mesh
    model.final_logits_bias.zero_()
    for name, p in model.named_parameters():  # so that the output depends on the source
        p.data *= 0 if name.endswith("bias") else 4 if "_attn." in name else 1
    model.save_pretrained(path)
    texts = ["the cat sat", ">>deu<< naïve 日 friends ran", "Müde"]
    given = tokenizer(texts, return_tensors="pt", padding=True)
    loaded = load(str(path), mesh)
    generator = Generator(loaded.model, loaded.params, loaded.tokenizer, context=48, mesh=mesh)
    for count in (1, 4):
        output = model.generate(**given, do_sample=False, num_beams=count, early_stopping=False, max_new_tokens=STEPS)  # fmt: skip
        expected = tokenizer.batch_decode(output, skip_special_tokens=True)
        got = generator.beam_search(None, BeamSearchOptions(count), sources=texts, max_new_tokens=STEPS)
        assert [row.text for row in got] == expected and len({*expected}) == 3
        if count == 1:
            sampled = generator(sources=texts, sampling=SamplingParams(0.0), max_new_tokens=STEPS)
            assert [row.text for row in sampled] == expected


@pytest.mark.parametrize(("rules", "message"), [
    ({"bad_words_ids": [[5, 6]]}, "bad_words_ids of several tokens"),
    ({"forced_eos_token_id": 5}, "forced_eos_token_id=5 is not supported; it may be None or 2"),
])  # fmt: skip
def test_unsupported_generation_configs_are_rejected(rules, message, refuses):
    with refuses(message):
        HFConfig({"eos_token_id": EOS} | rules, "config.json").generation_defaults()


def test_headless_checkpoint_has_zero_logits_bias(imported, tmp_path):
    """BART's published checkpoints have no logits bias."""
    imported = imported("bart")
    imported.hf_model.model.save_pretrained(tmp_path)
    family, config = import_export.read_config(tmp_path)
    params = import_export.read_params(tmp_path, family, import_export.abstract_params(config))
    assert not np.asarray(params["decoder"]["readout_bias"]["bias"]).any()
    tables = (p["decoder"]["embedding"]["table"] for p in (params, imported.params))
    np.testing.assert_array_equal(*tables)


def test_start_tokens_are_read_and_untied_embeddings_rejected(imported, tmp_path, refuses):
    imported = imported("bart")
    imported.hf_model.generation_config.forced_bos_token_id = 5
    imported.hf_model.save_pretrained(tmp_path)
    imported.hf_model.generation_config.forced_bos_token_id = None
    config = import_export.read_config(tmp_path)[1]
    defaults = config.generation
    assert (defaults.decoder_start_token_id, defaults.forced_decoder_ids) == (START, (5,))
    imported.hf_model.config.tie_word_embeddings = False
    imported.hf_model.config.save_pretrained(tmp_path)
    imported.hf_model.config.tie_word_embeddings = True
    with refuses("tie_word_embeddings=False"):
        import_export.read_config(tmp_path)
