"""Whisper: an encoder of sound and a decoder of text."""

import itertools
from dataclasses import replace
from typing import Any

from attnlab.layers import AttentionConfig, LayerNormConfig, MLPConfig
from attnlab.models import DecoderConfig, Learned, Seq2SeqConfig, SpeechEncoderConfig
from attnlab.pretrained.families.base import Family, convolution, linear, norm
from attnlab.pretrained.hf_config import HF_ACTIVATION_NAMES, HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping


def whisper(s: HFConfig) -> Seq2SeqConfig:
    """Whisper (Radford et al. 2022, arXiv 2212.04356, section 2.2)."""
    for name in ("encoder_layerdrop", "decoder_layerdrop", "activation_dropout"):
        s.require(name, 0.0)
    s.require("apply_spec_augment", False)
    both: dict[str, Any] = {
        "width": s["d_model"],
        "norm": LayerNormConfig(),
        "dropout": s.get("dropout", 0.0),
    }
    # A null is a language to be found out; what comes after it cannot be forced without.
    forced = [token for _, token in s.get("forced_decoder_ids") or ()]
    forced_ids = tuple(itertools.takewhile(lambda token: token is not None, forced))
    generation = s.generation_defaults(s["decoder_start_token_id"])
    return Seq2SeqConfig(
        SpeechEncoderConfig(
            depth=s["encoder_layers"],
            attention=_attention(s, "encoder"),
            feed_forward=MLPConfig(s["encoder_ffn_dim"], s.activation("activation_function")),
            mels=s["num_mel_bins"],
            frames=2 * s["max_source_positions"],
            **both,
        ),
        DecoderConfig(
            depth=s["decoder_layers"],
            attention=_attention(s, "decoder"),
            feed_forward=MLPConfig(s["decoder_ffn_dim"], s.activation("activation_function")),
            positions=Learned(s["max_target_positions"]),
            vocab_size=s["vocab_size"],
            tied=s.get("tie_word_embeddings", True),
            **both,
        ),
        generation=replace(generation, forced_decoder_ids=forced_ids),
    )


def fields(config: Seq2SeqConfig, length: int) -> dict[str, Any]:
    """What Whisper's `config.json` says of an encoder of sound and a decoder."""
    reads = config.encoder if isinstance(config.encoder, SpeechEncoderConfig) else SpeechEncoderConfig()
    writes = config.decoder
    positions = writes.positions.length if isinstance(writes.positions, Learned) else length
    return {
        "d_model": writes.width,
        "encoder_layers": reads.depth,
        "decoder_layers": writes.depth,
        "encoder_attention_heads": reads.attention.heads,
        "decoder_attention_heads": writes.attention.heads,
        "encoder_ffn_dim": reads.feed_forward.hidden(reads.width),
        "decoder_ffn_dim": writes.feed_forward.hidden(writes.width),
        "activation_function": HF_ACTIVATION_NAMES.get(writes.feed_forward.activation),
        "num_mel_bins": reads.mels,
        "max_source_positions": reads.frames // 2,
        "max_target_positions": positions,
        "vocab_size": writes.vocab_size,
        "tie_word_embeddings": writes.tied,
        "decoder_start_token_id": config.generation.decoder_start_token_id,
    }


def _attention(s: HFConfig, half: str) -> AttentionConfig:
    return AttentionConfig(s[f"{half}_attention_heads"], bias="qvo", dropout=s.get("attention_dropout", 0.0))


def _half(half: str, branches: dict[str, str]) -> list[TensorMapping]:
    """The rows of one half, whose attention branches have these names there."""
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
        ignored=(r"proj_out\.weight",),
        config_class=Seq2SeqConfig,
    )
}
