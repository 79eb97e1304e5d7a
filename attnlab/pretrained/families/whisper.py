"""Whisper: an audio encoder and a text decoder."""

import itertools
from dataclasses import replace
from typing import Any

from attnlab.layers import AttentionConfig, LayerNormConfig, MLPConfig
from attnlab.models import DecoderConfig, Learned, Seq2SeqConfig, SpeechEncoderConfig
from attnlab.pretrained.families.base import Family, convolution, linear, norm
from attnlab.pretrained.hf_config import HF_ACTIVATION_NAMES, HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping


def whisper(hf: HFConfig) -> Seq2SeqConfig:
    """Whisper (Radford et al. 2022, arXiv 2212.04356, section 2.2)."""
    for name in ("encoder_layerdrop", "decoder_layerdrop", "activation_dropout"):
        hf.require(name, 0.0)
    hf.require("apply_spec_augment", False)
    both: dict[str, Any] = {
        "width": hf["d_model"],
        "norm": LayerNormConfig(),
        "dropout": hf.get("dropout", 0.0),
    }
    # A null asks for language detection, which is not supported; drop it and all later tokens.
    forced = [token for _, token in hf.get("forced_decoder_ids") or ()]
    forced_ids = tuple(itertools.takewhile(lambda token: token is not None, forced))
    generation = hf.generation_defaults(hf["decoder_start_token_id"])
    return Seq2SeqConfig(
        SpeechEncoderConfig(
            depth=hf["encoder_layers"],
            attention=_attention(hf, "encoder"),
            feed_forward=MLPConfig(hf["encoder_ffn_dim"], hf.activation("activation_function")),
            mels=hf["num_mel_bins"],
            frames=2 * hf["max_source_positions"],
            **both,
        ),
        DecoderConfig(
            depth=hf["decoder_layers"],
            attention=_attention(hf, "decoder"),
            feed_forward=MLPConfig(hf["decoder_ffn_dim"], hf.activation("activation_function")),
            positions=Learned(hf["max_target_positions"]),
            vocab_size=hf["vocab_size"],
            tied=hf.get("tie_word_embeddings", True),
            **both,
        ),
        generation=replace(generation, forced_decoder_ids=forced_ids),
    )


def fields(config: Seq2SeqConfig, length: int) -> dict[str, Any]:
    """Return Whisper's `config.json` for an audio encoder and a decoder."""
    encoder = config.encoder if isinstance(config.encoder, SpeechEncoderConfig) else SpeechEncoderConfig()
    decoder = config.decoder
    positions = decoder.positions.length if isinstance(decoder.positions, Learned) else length
    return {
        "d_model": decoder.width,
        "encoder_layers": encoder.depth,
        "decoder_layers": decoder.depth,
        "encoder_attention_heads": encoder.attention.heads,
        "decoder_attention_heads": decoder.attention.heads,
        "encoder_ffn_dim": encoder.feed_forward.hidden(encoder.width),
        "decoder_ffn_dim": decoder.feed_forward.hidden(decoder.width),
        "activation_function": HF_ACTIVATION_NAMES.get(decoder.feed_forward.activation),
        "num_mel_bins": encoder.mels,
        "max_source_positions": encoder.frames // 2,
        "max_target_positions": positions,
        "vocab_size": decoder.vocab_size,
        "tie_word_embeddings": decoder.tied,
        "decoder_start_token_id": config.generation.decoder_start_token_id,
    }


def _attention(hf: HFConfig, half: str) -> AttentionConfig:
    return AttentionConfig(
        hf[f"{half}_attention_heads"], bias="qvo", dropout=hf.get("attention_dropout", 0.0)
    )


def _half(half: str, branches: dict[str, str]) -> list[TensorMapping]:
    """Return the mappings of one half; `branches` has the tensor names of attention branches."""
    param, hf_name = f"{half}/layers/{{layer}}", f"model.{half}.layers.{{layer}}"
    rows: list[TensorMapping] = []
    for branch, name in branches.items():
        rows += norm(f"{param}/{branch}_norm", f"{hf_name}.{name}_layer_norm")
        for part in ("query", "key", "value"):
            rows += linear(f"{param}/{branch}/{part}", f"{hf_name}.{name}.{part[0]}_proj", "(h d) e -> e h d")
        out = f"{hf_name}.{name}.out_proj"
        rows.append(TensorMapping(f"{param}/{branch}/out/kernel", f"{out}.weight", "e (h d) -> h d e"))
        rows.append(TensorMapping(f"{param}/{branch}/out/bias", f"{out}.bias"))
    rows += norm(f"{param}/feed_forward_norm", f"{hf_name}.final_layer_norm")
    for part, name in (("up", "fc1"), ("down", "fc2")):
        rows += linear(f"{param}/feed_forward/{part}", f"{hf_name}.{name}")
    return [*rows, *norm(f"{half}/norm", f"model.{half}.layer_norm")]


TENSORS = (
    *convolution("encoder/convolution1", "model.encoder.conv1", "o i k -> k i o"),
    *convolution("encoder/convolution2", "model.encoder.conv2", "o i k -> k i o"),
    TensorMapping("encoder/position_embedding", "model.encoder.embed_positions.weight"),
    *_half("encoder", {"attention": "self_attn"}),
    TensorMapping("decoder/embedding/table", "model.decoder.embed_tokens.weight"),
    TensorMapping("decoder/position_embedding/table", "model.decoder.embed_positions.weight"),
    *_half("decoder", {"attention": "self_attn", "cross_attention": "encoder_attn"}),
    TensorMapping("decoder/readout/table", "proj_out.weight"),
)
FAMILIES = {
    "whisper": Family(
        whisper,
        TENSORS,
        prefix="model.",
        architecture="WhisperForConditionalGeneration",
        fields=fields,
        readout=TensorMapping("decoder/embedding/table", "proj_out.weight"),
        config_class=Seq2SeqConfig,
    )
}
