"""Types and bounds of the fields of a checkpoint's `config.json`, checked by `HFConfig`.

The bounds are far above any published model, and low enough that no field alone can make the
import slow or large.
"""

from collections.abc import Collection, Mapping
from typing import Any

from attnlab.errors import InputError
from attnlab.untrusted import BOOLEAN, NULL, OBJECT, Expected, Fields, integer, list_of, number, string

LAYERS, SIZE, VOCABULARY = integer(1, 1024), integer(1, 1 << 20), integer(1, 1 << 24)
POSITIONS, HEADS, TOKEN = integer(1, 1 << 27), integer(1, 4096), integer(0, (1 << 31) - 1)
RATE, EPSILON, NAME, NAMES = number(0, 1), number(0, 1), string(), list_of(string(), 0, 1024)
SCALE, NON_NEGATIVE = number(1e-6, 1e9), number(0, 1e9)
SIDE = integer(1, 1 << 14)  # of an image or a patch, in pixels
SIDES = SIDE | list_of(SIDE, 2, 2)
TOKENS = list_of(TOKEN)

# Each layer has tensors of its own, so the tensors bound these counts.
LAYER_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"),
    *("encoder_layers", "decoder_layers"),
)
# Dimensions of tensors.
SIZES = (
    *("hidden_size", "n_embd", "dim", "d_model", "embedding_size"),
    *("intermediate_size", "n_inner", "hidden_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"),
)
VOCABULARIES = ("vocab_size", "decoder_vocab_size")
# Lengths of position tables that are always tensors.
TABLE_LENGTHS = ("n_positions", "max_source_positions", "max_target_positions")

EXPECTED: dict[str, Expected] = {
    **dict.fromkeys(LAYER_COUNTS, LAYERS),
    **dict.fromkeys(SIZES, SIZE),
    **dict.fromkeys(VOCABULARIES, VOCABULARY),
    **dict.fromkeys(
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"),
            *("encoder_attention_heads", "decoder_attention_heads"),
        ),
        HEADS,
    ),
    **dict.fromkeys(("head_dim", "d_kv"), integer(1, 1 << 16)),
    **dict.fromkeys(
        (
            *("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"),
            *("original_max_position_embeddings", "max_seq_length", "sliding_window", "local_attention"),
            *("relative_attention_max_distance",),
        ),
        POSITIONS,
    ),
    **dict.fromkeys(
        (
            *("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "classifier_dropout"),
            *("classifier_dropout_prob", "dropout", "dropout_rate", "hidden_dropout_prob", "resid_pdrop"),
            *("residual_dropout", "seq_classif_dropout"),
        ),
        RATE,
    ),
    **dict.fromkeys(
        ("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "rms_norm_eps"), EPSILON
    ),
    **dict.fromkeys(
        (
            *("attention_bias", "classifier_bias", "decoder_bias", "mlp_bias", "norm_bias", "qkv_bias"),
            *("multimodal_projector_bias", "output_router_logits", "scale_decoder_outputs", "use_bias"),
            *("scale_embedding", "share_encoder_decoder_embeddings", "tie_word_embeddings"),
            *("use_mask_token", "use_sliding_window", "use_swiglu_ffn"),
            *("scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
        ),
        BOOLEAN,
    ),
    **dict.fromkeys(
        (
            *("activation", "activation_function", "classifier_activation", "hidden_act"),
            *("hidden_activation", "projector_hidden_act", "feed_forward_proj", "model_type"),
            *("classifier_pooling",),
        ),
        NAME,
    ),
    **dict.fromkeys(("architectures", "layer_types"), NAMES),
    **dict.fromkeys(
        (
            *("bos_token_id", "pad_token_id", "decoder_start_token_id", "image_token_index"),
            *("forced_bos_token_id",),
        ),
        TOKEN,
    ),
    "eos_token_id": TOKEN | TOKENS | NULL,
    "forced_eos_token_id": TOKEN | TOKENS,
    "projection_dim": SIZE,
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), TOKENS),
    "bad_words_ids": list_of(TOKENS),
    "forced_decoder_ids": list_of(list_of(TOKEN | NULL, 2, 2)),
    **dict.fromkeys(
        (
            *("text_config", "vision_config", "encoder", "decoder", "id2label"),
            *("text_config_dict", "vision_config_dict"),
            *("rope_parameters", "rope_scaling"),
        ),
        OBJECT,
    ),
    **dict.fromkeys(("image_size", "patch_size"), SIDES),
    **dict.fromkeys(("num_channels", "num_register_tokens"), integer(0, 4096)),
    "num_mel_bins": integer(1, 4096),
    "num_labels": integer(0, 1 << 20),
    "type_vocab_size": integer(0, 1 << 16),
    **dict.fromkeys(("num_local_experts", "num_experts_per_tok"), integer(1, 4096)),
    **dict.fromkeys(("inner_group_num", "num_hidden_groups", "global_attn_every_n_layers"), LAYERS),
    "relative_attention_num_buckets": integer(2, 1 << 16),
    "sliding_window_pattern": LAYERS,
    "max_window_layers": integer(0, 1024),
    "vision_feature_layer": integer(-1024, 1024),
    "cross_attention_hidden_size": SIZE,
    "mlp_ratio": number(1 / 64, 64),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"), SCALE),
    **dict.fromkeys(("logit_scale_init_value", "layerscale_value"), number(-1e6, 1e6)),
    "router_aux_loss_coef": NON_NEGATIVE,
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), number(1, 1e18)),
    "partial_rotary_factor": number(1 / 1024, 1),
}
# The fields of `rope_parameters` and `rope_scaling`, or of their parts for each layer type.
EXPECTED_ROPE: dict[str, Expected] = {
    **dict.fromkeys(("full_attention", "sliding_attention"), OBJECT),
    **dict.fromkeys(("rope_type", "type"), NAME),
    **{name: EXPECTED[name] for name in ("rope_theta", "partial_rotary_factor")},
    "original_max_position_embeddings": POSITIONS,
    "factor": SCALE,
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), SCALE),
    **dict.fromkeys(("mscale", "mscale_all_dim", "attention_factor"), NON_NEGATIVE),
    **dict.fromkeys(("short_factor", "long_factor"), list_of(SCALE, 1, 1 << 16)),
    **dict.fromkeys(("short_mscale", "long_mscale"), NON_NEGATIVE),
    "truncate": BOOLEAN,
}


def check_against_tensors(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Check that counts of layers and sizes are not above those of a checkpoint's tensors.

    This takes no time, unlike tracing a model of 10^6 layers to compare its shapes.

    Args:
      fields: the fields of `config.json`.
      shapes: the shapes of the tensors by name.
      where: the file name for error messages.

    Raises:
      InputError: a count or a size that the tensors exclude.
    """
    numbers = (int(part) for name in shapes for part in name.split(".") if part.isdecimal() and len(part) < 9)
    layers = 1 + max(numbers, default=0)
    size = max((dim for shape in shapes.values() for dim in shape), default=0)
    # Next to nested configs, fields of the top level may be unused defaults, as in PaliGemma.
    for prefix, part in _parts(fields) or [("", fields)]:
        typed = Fields(part, f"{where}{prefix}", EXPECTED)
        shared = "num_hidden_groups" in part  # ALBERT: one layer's tensors serve all layers
        _check_highest(typed, () if shared else LAYER_COUNTS, layers, "layers of tensors", where + prefix)
        sizes = (*SIZES, *VOCABULARIES, *TABLE_LENGTHS)
        _check_highest(typed, sizes, size, "in the largest tensor's side", where + prefix)
        if (patches := _patches(typed)) > size:
            raise InputError(
                f"{where}{prefix}: image_size and patch_size give {patches} positions, but the largest "
                f"tensor's side is {size}"
            )


def _patches(fields: Fields) -> int:
    """Return the number of patches of an image; a position table has a row for each."""
    image, patch = fields.get("image_size"), fields.get("patch_size")
    if image is None or patch is None:
        return 0
    pairs = ((side, side) if isinstance(side, int) else side for side in (image, patch))
    (rows, columns), (height, width) = pairs
    return (rows // height) * (columns // width)


def _parts(fields: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    nested = [(name, fields.get(name)) for name in ("text_config", "vision_config", "encoder", "decoder")]
    return [(f": {name}", part) for name, part in nested if isinstance(part, Mapping)]


def _check_highest(fields: Fields, names: Collection[str], highest: int, kind: str, where: str) -> None:
    for name in names:
        if (value := fields.get(name, 0)) > highest:
            raise InputError(f"{where}: {name}={value} does not match the file, which has {highest} {kind}")
