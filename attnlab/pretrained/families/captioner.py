"""Image captioning: GPT-2 with cross-attention to a ViT or DeiT encoder."""

from typing import Any

from attnlab.models import CaptionerConfig, ViTConfig
from attnlab.pretrained.families import gpt2, vit
from attnlab.pretrained.families.base import Family, linear, nested_tensors
from attnlab.pretrained.hf_config import HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping

ENCODERS = {"vit": ("ViTModel", vit.vit), "deit": ("DeiTModel", vit.deit)}
DECODER = gpt2.FAMILIES["gpt2"]


def vision_encoder_decoder(hf: HFConfig) -> CaptionerConfig:
    """An encoder and a decoder joined by cross-attention (Rothe et al. 2019, arXiv 1907.12461)."""
    hf_encoder, hf_decoder = hf.part("encoder"), hf.part("decoder")
    hf_encoder.require("model_type", *ENCODERS)
    hf_decoder.require("model_type", "gpt2")
    hf_decoder.require("add_cross_attention", True)
    architecture, config = ENCODERS[hf_encoder["model_type"]]
    encoder = config(hf.part("encoder", architectures=[architecture]))
    hf_decoder.require("scale_attn_by_inverse_layer_idx", False)
    decoder = gpt2.decoder(hf_decoder)
    start_tokens = (
        hf.get("decoder_start_token_id"),
        hf_decoder.get("decoder_start_token_id"),
        hf_decoder.get("bos_token_id"),
    )
    return CaptionerConfig(
        encoder=encoder,
        decoder=decoder,
        projection=encoder.width != decoder.width and hf_decoder.get("cross_attention_hidden_size") is None,
        generation=hf.generation_defaults(next((token for token in start_tokens if token is not None), None)),
    )


def fields(config: CaptionerConfig, length: int) -> dict[str, Any]:
    """Return the `config.json` of a captioner, which nests those of both halves."""
    encoder, decoder = config.encoder, config.decoder
    start = config.generation.decoder_start_token_id
    tokens = dict.fromkeys(("decoder_start_token_id", "bos_token_id", "eos_token_id"), start)
    cross_attention = {"is_decoder": True, "add_cross_attention": True}
    return {
        "encoder": {"model_type": _encoder_type(encoder), **vit.classifier_fields(encoder, length)},
        "decoder": {"model_type": "gpt2", **gpt2.fields(decoder, length), **cross_attention, **tokens},
        "decoder_start_token_id": start,
        "tie_word_embeddings": decoder.tied,
    }


def _encoder_type(encoder: ViTConfig) -> str:
    return "vit" if encoder.class_tokens == 1 else "deit"


def tensors(config: CaptionerConfig) -> tuple[TensorMapping, ...]:
    """Return the mappings of both halves and of the projection between them."""
    encoder = vit.FAMILIES[_encoder_type(config.encoder)].for_config(config.encoder)
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
        readout=TensorMapping("decoder/embedding/table", "decoder.lm_head.weight"),
        tie_fields=("decoder.tie_word_embeddings",),
        config_class=CaptionerConfig,
        tensors_of=tensors,
    )
}
