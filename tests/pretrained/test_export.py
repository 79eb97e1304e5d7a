"""Models trained from scratch have the same outputs in transformers after export."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from attnlab import config as configs
from attnlab.data import Words
from attnlab.layers import (
    AttentionConfig,
    GatedMLPConfig,
    LayerNormConfig,
    MLPConfig,
    RelativeBias,
    RMSNormConfig,
)
from attnlab.layers.contrastive_loss import SiglipLoss
from attnlab.layers.pooling import Distilled, Probe
from attnlab.models import (
    ClassifierConfig,
    ContrastiveConfig,
    DecoderConfig,
    EncoderConfig,
    GenerationDefaults,
    Learned,
    MeanOfTokens,
    ProjectorConfig,
    Seq2SeqConfig,
    VisionLanguageConfig,
    ViTConfig,
)
from attnlab.models.contrastive import LastToken, ProjectionConfig, TextTowerConfig
from attnlab.models.heads import DenseConfig
from attnlab.pretrained import import_export, load
from tests.pretrained.hf_models import assert_close
from tests.programs import ROOT

pytestmark = pytest.mark.parity

# Constants that Pegasus computes itself but reports as missing.
SINES = {f"model.{half}.embed_positions.weight" for half in ("encoder", "decoder")}
LENGTH = 10  # context length; the speech experiment's model has 8
TOKENIZER = Words().train([" ".join(f"w{i}" for i in range(40))])


def experiment(name):
    """Return the model config of an experiment."""
    return configs.load(str(ROOT / "experiments" / f"{name}.py")).config.model


SIZES = {"depth": 2, "width": 16, "attention": AttentionConfig(2, bias=True)}
T5 = {"depth": 2, "width": 16, "attention": AttentionConfig(2, head_dim=6, scale=1.0), "positions": RelativeBias(8, 20)}  # fmt: skip
BART = SIZES | {
    "norm": LayerNormConfig(),
    "placement": "post",
    "positions": Learned(20, 2),
    "embedding_norm": True,
}
IMAGE = {"image": (8, 8, 3), "patch": (4, 4)}
CASES = {
    "digits": ("ViTForImageClassification", experiment("digits")),
    "masked_lm": ("ModernBertForMaskedLM", experiment("masked_lm")),
    "translate": ("MarianMTModel", experiment("translate")),
    "contrastive": ("CLIPModel", experiment("contrastive")),
    "caption": ("VisionEncoderDecoderModel", experiment("caption")),
    "speech": ("WhisperForConditionalGeneration", experiment("speech")),
    "deit": (
        "DeiTForImageClassificationWithTeacher",
        ViTConfig(**SIZES | {"attention": AttentionConfig(2, bias="o")}, image=(8, 12, 1), patch=(4, 2), class_tokens=2, pooling=Distilled()),
    ),
    "siglip_vision_model": ("SiglipVisionModel", ViTConfig(**SIZES, **IMAGE, class_tokens=0, pooling=Probe(), classes=0)),
    "siglip": (
        "SiglipModel",
        ContrastiveConfig(
            image=ViTConfig(**SIZES, **IMAGE, class_tokens=0, pooling=Probe(), classes=0),
            text=TextTowerConfig(**SIZES, positions=Learned(LENGTH), pattern=EncoderConfig().pattern, pooling=LastToken()),
            width=16,
            image_projection=None,
            text_projection=ProjectionConfig(bias=True),
            objective=SiglipLoss(),
        ),
    ),
    "modernbert, documents": (
        "ModernBertForSequenceClassification",
        replace(experiment("masked_lm"), head=ClassifierConfig(3, MeanOfTokens(), DenseConfig("gelu_exact", norm=True))),
    ),
    "t5": (
        "T5ForConditionalGeneration",
        Seq2SeqConfig(
            EncoderConfig(feed_forward=MLPConfig(24, "relu", bias=False), **T5),
            DecoderConfig(feed_forward=MLPConfig(24, "relu", bias=False), scale_readout=True, **T5),
            shared_embedding=True,
        ),
    ),
    "t5 1.1": (
        "T5ForConditionalGeneration",
        Seq2SeqConfig(
            EncoderConfig(feed_forward=GatedMLPConfig(24, "gelu"), **T5),
            DecoderConfig(feed_forward=GatedMLPConfig(24, "gelu"), tied=False, **T5 | {"depth": 3}),
            shared_embedding=True,
        ),
    ),
    "bart": (
        "BartForConditionalGeneration",
        Seq2SeqConfig(EncoderConfig(**BART), DecoderConfig(readout_bias=True, **BART), shared_embedding=True, generation=GenerationDefaults(forced_decoder_ids=(3,))),
    ),
    "llava": ("LlavaForConditionalGeneration", VisionLanguageConfig(
        encoder=ViTConfig(**SIZES, **IMAGE, classes=0, patch_bias=False, embedding_norm=True),
        decoder=DecoderConfig(depth=2, width=16, attention=AttentionConfig(4, kv_heads=2), feed_forward=GatedMLPConfig(24)),
        projector=ProjectorConfig("gelu_exact"),
        encoder_final_norm=False,
        image_token_id=5,
    )),
    "paligemma": ("PaliGemmaForConditionalGeneration", VisionLanguageConfig(
        encoder=ViTConfig(**SIZES, **IMAGE, class_tokens=0, pooling=Probe(), classes=0),
        decoder=DecoderConfig(depth=2, width=16, attention=AttentionConfig(4, kv_heads=1), feed_forward=GatedMLPConfig(24, "gelu"), norm=RMSNormConfig(zero_centered_scale=True), scale_embedding=True),
        image_token_id=5,
        prompt_suffix="\n",
        bidirectional_prompt=True,
    )),
    "pegasus": (
        "PegasusForConditionalGeneration",
        replace(experiment("translate"), **{
            half: replace(getattr(experiment("translate"), half), placement="pre") for half in ("encoder", "decoder")
        }),
    ),
}  # fmt: skip


def random_params(config, seed=0):
    """Draw parameters with large variance; scales have mean 1."""
    abstract, rng = import_export.abstract_params(config), np.random.default_rng(seed)

    def draw(path, x):
        noise = jnp.asarray(rng.normal(size=x.shape), x.dtype)
        return 1 + 0.3 * noise if "scale" in str(path[-1]) else 0.15 * noise

    return jax.tree_util.tree_map_with_path(draw, abstract)


def outputs(model, config, tokens, targets, source):
    """Return the outputs for text, for images or audio, or for both."""
    if isinstance(config, EncoderConfig):
        return model(tokens)[:, 0] if isinstance(config.head, ClassifierConfig) else model(tokens)
    if isinstance(config, ViTConfig):
        return model(None, source=source)[:, 0]
    if isinstance(config, ContrastiveConfig):
        return model(tokens, source=source)[:, 0]
    if isinstance(config, VisionLanguageConfig):
        return model(tokens.at[:, :4].set(config.image_token_id), source=source)
    return model(targets, source=tokens if config.source_shape == (1,) else source)


def hf_outputs(model, config, tokens, targets, source):
    """Return the same outputs of a transformers model."""
    torch = pytest.importorskip("torch")
    text, targets = torch.tensor(tokens), torch.tensor(targets)
    if isinstance(config, EncoderConfig):
        return model(text).logits
    if config.source_shape == (1,):
        return model(text, decoder_input_ids=targets).logits
    pixels = torch.tensor(np.moveaxis(source, -1, 1))
    if isinstance(config, ViTConfig):
        result = model(pixels)
        return result.logits if config.classes != 0 else result.pooler_output
    if isinstance(config, ContrastiveConfig):
        return model(text, pixels).logits_per_text
    if isinstance(config, VisionLanguageConfig):
        text[:, :4] = config.image_token_id
        prompt = (
            {"token_type_ids": (text != config.image_token_id).long()} if config.bidirectional_prompt else {}
        )
        return model(text, pixels, attention_mask=torch.ones_like(text), **prompt).logits
    return model(pixels, decoder_input_ids=targets).logits


@pytest.mark.parametrize("case", CASES)
def test_export_matches_transformers_and_reimports(case, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    architecture, config = CASES[case]
    config, folder = config.with_vocab_size(TOKENIZER.vocab_size), epath.Path(tmp_path) / "out"
    params = random_params(config)
    import_export.write_checkpoint(folder, config, params, import_export.FromScratch(TOKENIZER, LENGTH))

    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(6, TOKENIZER.vocab_size, (2, 3, 8))
    tokens[:, -1] = TOKENIZER.eos_id
    source = rng.normal(size=(3, *(config.source_shape or ()))).astype(np.float32)
    arrays = jnp.asarray(tokens), jnp.asarray(targets), jnp.asarray(source)
    model = config.build(TOKENIZER.vocab_size)
    wanted = model.apply({"params": params}, config, *arrays, method=outputs)
    hf_model, report = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    report["missing_keys"] -= SINES
    assert not any(report.values()), report
    with torch.no_grad():
        assert_close(hf_outputs(hf_model.eval(), config, tokens, targets, source), wanted)

    reloaded = load(str(folder))
    jax.tree.map(np.testing.assert_array_equal, reloaded.params, params)
