"""Captioners: an encoder of images, and GPT-2 that looks at what it made of one."""

from typing import Any

from attnlab.models import CaptionerConfig, ViTConfig
from attnlab.pretrained.families import gpt2, vit
from attnlab.pretrained.families.base import Family, linear, nested_tensors
from attnlab.pretrained.hf_config import HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping

ENCODERS = {"vit": ("ViTModel", vit.vit), "deit": ("DeiTModel", vit.deit)}
DECODER = gpt2.FAMILIES["gpt2"]


def vision_encoder_decoder(s: HFConfig) -> CaptionerConfig:
    """Any two models with cross-attention put between them (Rothe et al. 2019, arXiv 1907.12461)."""
    reads, writes = s.part("encoder"), s.part("decoder")
    reads.require("model_type", *ENCODERS)
    writes.require("model_type", "gpt2")
    writes.require("add_cross_attention", True)
    architecture, config = ENCODERS[reads["model_type"]]
    encoder = config(s.part("encoder", architectures=[architecture]))
    decoder = gpt2.decoder(writes)
    begins = (
        s.get("decoder_start_token_id"),
        writes.get("decoder_start_token_id"),
        writes.get("bos_token_id"),
    )
    return CaptionerConfig(
        encoder=encoder,
        decoder=decoder,
        projection=encoder.width != decoder.width and writes.get("cross_attention_hidden_size") is None,
        generation=s.generation_defaults(next((token for token in begins if token is not None), None)),
    )


def fields(config: CaptionerConfig, length: int) -> dict[str, Any]:
    """What its `config.json` says of a captioner: what those of both halves do."""
    reads, writes = config.encoder, config.decoder
    start = config.generation.decoder_start_token_id
    tokens = dict.fromkeys(("decoder_start_token_id", "bos_token_id", "eos_token_id"), start)
    looks = {"is_decoder": True, "add_cross_attention": True}
    return {
        "encoder": {"model_type": _kind(reads), **vit.classifier_fields(reads, length)},
        "decoder": {"model_type": "gpt2", **gpt2.fields(writes, length), **looks, **tokens},
        "decoder_start_token_id": start,
        "tie_word_embeddings": writes.tied,
    }


def _kind(encoder: ViTConfig) -> str:
    return "vit" if encoder.class_tokens == 1 else "deit"


def tensors(config: CaptionerConfig) -> tuple[TensorMapping, ...]:
    """The tables of both halves, and the map between them."""
    encoder = vit.FAMILIES[_kind(config.encoder)].for_config(config.encoder)
    return (
        *nested_tensors(encoder, "encoder", "encoder", bare=True),
        *linear("projection", "enc_to_dec_proj"),
        *nested_tensors(DECODER, "decoder", "decoder"),
    )


FAMILIES = {
    "vision-encoder-decoder": Family(
        vision_encoder_decoder,
        (),
        prefix="",
        architecture="VisionEncoderDecoderModel",
        fields=fields,
        ignored=DECODER.ignored,
        config_class=CaptionerConfig,
        tensors_of=tensors,
    )
}
