"""CLIP and SigLIP: an image tower and a text tower."""

from typing import Any

from attnlab.layers import AttentionConfig, Bidirectional, Causal, LayerNormConfig, LayerSpec, MLPConfig
from attnlab.layers.contrastive_loss import ClipLoss, SiglipLoss
from attnlab.models import ContrastiveConfig, Learned
from attnlab.models.contrastive import EndOfText, LastToken, ProjectionConfig, TextTowerConfig
from attnlab.pretrained.families import vit
from attnlab.pretrained.families.base import Family, linear, norm, size_fields
from attnlab.pretrained.families.vit import TOWER, clip_vision, layer, siglip_vision, tower
from attnlab.pretrained.hf_config import HF_ACTIVATION_NAMES, HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping

# Defaults of transformers' config classes: configs on the hub may omit fields equal to them.
COMMON = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
IMAGE = COMMON | {"image_size": 224, "patch_size": 16, "num_channels": 3}
CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "attention_dropout": 0.0}
SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
SMALLER = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
CLIP_IMAGE = IMAGE | CLIP | {"patch_size": 32}
CLIP_TEXT = (
    COMMON | CLIP | SMALLER | {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}
)
SIGLIP_IMAGE = IMAGE | SIGLIP
SIGLIP_TEXT = COMMON | SIGLIP | {"vocab_size": 32000, "max_position_embeddings": 64}


def _text(hf: HFConfig, spec: LayerSpec, pooling: EndOfText | LastToken) -> TextTowerConfig:
    return TextTowerConfig(
        depth=hf["num_hidden_layers"],
        width=hf["hidden_size"],
        attention=AttentionConfig(
            hf["num_attention_heads"], bias=True, dropout=hf.get("attention_dropout", 0.0)
        ),
        feed_forward=MLPConfig(hf["intermediate_size"], hf.activation("hidden_act")),
        norm=LayerNormConfig(hf["layer_norm_eps"]),
        positions=Learned(hf["max_position_embeddings"]),
        pattern=(spec,),
        vocab_size=hf["vocab_size"],
        pooling=pooling,
    )


def clip(hf: HFConfig) -> ContrastiveConfig:
    """CLIP (Radford et al. 2021, arXiv 2103.00020, section 2.4)."""
    text = _part(hf, "text_config", CLIP_TEXT)
    end = text["eos_token_id"]
    return ContrastiveConfig(
        image=clip_vision(_part(hf, "vision_config", CLIP_IMAGE)),
        # Older configs have eos_token_id=2, which means that the end token is the highest id.
        text=_text(text, Causal(), EndOfText(None if end == 2 else end)),
        width=hf.get("projection_dim", 512),
        objective=ClipLoss(hf.get("logit_scale_init_value", 2.6592)),
    )


def _part(hf: HFConfig, name: str, defaults: dict[str, Any]) -> HFConfig:
    """Return a nested config.

    Older configs also have a `text_config_dict`. As in transformers, its fields, and the defaults
    of those that it omits, replace those of `text_config`.
    """
    older = hf.get(f"{name}_dict")
    if older is not None:
        hf = hf.changed(**{name: {**hf.get(name, {}), **defaults, **older}})
    return hf.part(name, defaults)


def siglip(hf: HFConfig) -> ContrastiveConfig:
    """SigLIP (Zhai et al. 2023, arXiv 2303.15343): bidirectional text, padding included."""
    image = siglip_vision(hf.part("vision_config", SIGLIP_IMAGE))
    text = hf.part("text_config", SIGLIP_TEXT)
    text.require("projection_size", None, image.width)
    return ContrastiveConfig(
        image=image,
        text=_text(text, Bidirectional(), LastToken()),
        width=image.width,
        image_projection=None,
        text_projection=ProjectionConfig(bias=True),
        objective=SiglipLoss(),
    )


def fields(config: ContrastiveConfig, length: int) -> dict[str, Any]:
    """Return the `config.json` of both for two towers."""
    text = config.text
    end = text.pooling.token if isinstance(text.pooling, EndOfText) else None
    positions = text.positions.length if isinstance(text.positions, Learned) else length
    return {
        "vision_config": vit.fields(config.image, length),
        "text_config": {
            **size_fields(text),
            "hidden_act": HF_ACTIVATION_NAMES.get(text.feed_forward.activation),
            "layer_norm_eps": text.norm.epsilon,
            "max_position_embeddings": positions,
            "vocab_size": text.vocab_size,
            # Importers read 2 as the highest id; see `clip`.
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 2 if end is None else end),
            "projection_size": config.width,
        },
        "projection_dim": config.width,
        "logit_scale_init_value": config.objective.init_logit_scale,
    }


def _tensors(projection: str, logit: str) -> tuple[TensorMapping, ...]:
    """Return the tensor mappings.

    Args:
      projection: the tensor name of the text projection.
      logit: the layout of the logit scale and bias.
    """
    text = "text_model."
    return (
        TensorMapping("text/embedding/table", f"{text}embeddings.token_embedding.weight"),
        TensorMapping("text/position_embedding/table", f"{text}embeddings.position_embedding.weight"),
        *layer("text/layers/{layer}", text + "encoder.layers.{layer}", TOWER),
        *norm("text/norm", f"{text}final_layer_norm"),
        *tower("image/"),
        *linear("image_projection", "visual_projection"),
        *linear("text_projection", projection),
        TensorMapping("logit_scale", "logit_scale", logit),
        TensorMapping("logit_bias", "logit_bias", logit),
    )


def _family(config: Any, tensors: tuple[TensorMapping, ...], architecture: str) -> Family:
    ignored = (r".*\.position_ids",)
    return Family(config, tensors, "text_model.", architecture, fields, ignored, ContrastiveConfig)


FAMILIES = {
    "clip": _family(clip, _tensors("text_projection", ""), "CLIPModel"),
    "siglip": _family(siglip, _tensors("text_model.head", "1 ->"), "SiglipModel"),
}
