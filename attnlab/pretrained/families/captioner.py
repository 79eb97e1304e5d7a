"""Captioners: an encoder of images, and GPT-2 that looks at what it made of one."""

from attnlab.models import CaptionerConfig
from attnlab.pretrained.families import gpt2, vit
from attnlab.pretrained.families.base import Family, linear, within
from attnlab.pretrained.settings import Settings
from attnlab.pretrained.table import Tensor

ENCODERS = {"vit": ("ViTModel", vit.vit), "deit": ("DeiTModel", vit.deit)}
DECODER = gpt2.FAMILIES["gpt2"]


def vision_encoder_decoder(s: Settings) -> CaptionerConfig:
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
        start=next((token for token in begins if token is not None), None),
        **s.rules(),
    )


def tensors(config: CaptionerConfig) -> tuple[Tensor, ...]:
    """The tables of both halves, and the map between them."""
    encoder = vit.FAMILIES["vit" if config.encoder.class_tokens == 1 else "deit"].of(config.encoder)
    return (
        *within(encoder, "encoder", "encoder", bare=True),
        *linear("projection", "enc_to_dec_proj"),
        *within(DECODER, "decoder", "decoder"),
    )


FAMILIES = {
    "vision-encoder-decoder": Family(
        vision_encoder_decoder,
        (),
        prefix="",
        architecture="VisionEncoderDecoderModel",
        ignored=DECODER.ignored,
        made=CaptionerConfig,
        tensors_of=tensors,
    )
}
