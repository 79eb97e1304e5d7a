"""Vision Transformers: ViT, DeiT, DINOv2, and the image towers of CLIP and SigLIP."""

from collections.abc import Callable
from typing import Any

from attnlab.layers import AttentionConfig, GatedMLPConfig, LayerNormConfig, MLPConfig
from attnlab.layers.pooling import ClassAndMean, ClassToken, Distilled, Probe
from attnlab.models import ViTConfig
from attnlab.pretrained.families.base import Family, convolution, label_fields, linear, norm, size_fields
from attnlab.pretrained.hf_config import HF_ACTIVATION_NAMES, HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping

MODEL, CLASSIFIER, DISTILLED = "Model", "ForImageClassification", "ForImageClassificationWithTeacher"


def _common(hf: HFConfig, **changes: Any) -> ViTConfig:
    """Return a config with the fields that all of them name alike."""
    fields = {
        "depth": hf["num_hidden_layers"],
        "width": hf["hidden_size"],
        "attention": AttentionConfig(
            hf["num_attention_heads"],
            bias=True if hf.get("qkv_bias", True) else "o",
            dropout=hf.get("attention_probs_dropout_prob", hf.get("attention_dropout", 0.0)),
        ),
        "norm": LayerNormConfig(hf["layer_norm_eps"]),
        "image": (*_pair(hf["image_size"]), hf["num_channels"]),
        "patch": _pair(hf["patch_size"]),
        "classes": 0,
    }
    return ViTConfig(**(fields | changes))


def _pair(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _mlp(hf: HFConfig) -> MLPConfig:
    return MLPConfig(hf["intermediate_size"], hf.activation("hidden_act"))


def _classes(hf: HFConfig, name: str, *suffixes: str) -> int:
    """Return the number of classes, or 0 without a head; check the transformers class."""
    hf.require("architectures", *([f"{name}{suffix}"] for suffix in suffixes))
    hf.require("problem_type", None, "single_label_classification")
    if hf["architectures"] == [f"{name}{MODEL}"]:
        return 0
    return len(hf["id2label"]) if hf.get("id2label") else hf.get("num_labels", 2)


def vit(hf: HFConfig, name: str = "ViT", class_tokens: int = 1) -> ViTConfig:
    """ViT (Dosovitskiy et al. 2020, arXiv 2010.11929, section 3.1); a pooler if no head."""
    classes = _classes(hf, name, MODEL, CLASSIFIER, *([DISTILLED] if class_tokens == 2 else []))
    if not classes:
        hf.require("pooler_act", "tanh")
        hf.require("pooler_output_size", None, hf["hidden_size"])
    distilled = hf["architectures"] == [f"{name}{DISTILLED}"]
    return _common(
        hf,
        feed_forward=_mlp(hf),
        dropout=hf.get("hidden_dropout_prob", 0.0),
        class_tokens=class_tokens,
        pooling=Distilled() if distilled else ClassToken(dense=not classes),
        classes=classes,
    )


def deit(hf: HFConfig) -> ViTConfig:
    """DeiT: a ViT with a distillation token (Touvron et al. 2020, arXiv 2012.12877, section 4)."""
    return vit(hf, "DeiT", class_tokens=2)


def dinov2(hf: HFConfig, name: str = "Dinov2") -> ViTConfig:
    """DINOv2 (Oquab et al. 2023, arXiv 2304.07193): layer scale; SwiGLU in the largest."""
    hf.require("hidden_dropout_prob", 0.0)
    hf.require("drop_path_rate", 0.0)
    classes = _classes(hf, name, MODEL, CLASSIFIER)
    hidden = int(hf["hidden_size"] * hf["mlp_ratio"])
    gated = GatedMLPConfig((int(hidden * 2 / 3) + 7) // 8 * 8, bias=True)
    return _common(
        hf,
        feed_forward=gated if hf.get("use_swiglu_ffn") else MLPConfig(hidden, hf.activation("hidden_act")),
        layer_scale=hf.get("layerscale_value", 1.0),
        registers=hf.get("num_register_tokens", 0),
        mask_token=hf.get("use_mask_token", True),
        antialias="num_register_tokens" in hf,
        pooling=ClassAndMean() if classes else ClassToken(),
        classes=classes,
    )


def dinov2_with_registers(hf: HFConfig) -> ViTConfig:
    """DINOv2 with registers (Darcet et al. 2023, arXiv 2309.16588, section 2.2)."""
    return dinov2(hf, "Dinov2WithRegisters")


def siglip_vision(hf: HFConfig) -> ViTConfig:
    """SigLIP's tower: no class token, attention pooling (Zhai et al. 2023, arXiv 2303.15343)."""
    hf.require("vision_use_head", True)
    return _common(hf, feed_forward=_mlp(hf), class_tokens=0, pooling=Probe())


def clip_vision(hf: HFConfig) -> ViTConfig:
    """CLIP's tower: a norm after the embeddings (Radford et al. 2021, 2103.00020, section 2.4)."""
    return _common(hf, feed_forward=_mlp(hf), patch_bias=False, embedding_norm=True)


def fields(config: ViTConfig, length: int) -> dict[str, Any]:
    """Return the fields of `config.json` that all of them name alike: all fields of a tower."""
    del length
    return {
        **size_fields(config),
        "hidden_act": HF_ACTIVATION_NAMES.get(config.feed_forward.activation),
        "layer_norm_eps": config.norm.epsilon,
        "image_size": _size(config.image[:2]),
        "patch_size": _size(config.patch),
        "num_channels": config.image[2],
    }


def _size(pair: tuple[int, ...]) -> int | list[int]:
    """Return one number for a square, the only form that towers accept, else a list."""
    return pair[0] if pair[0] == pair[1] else list(pair)


def classifier_fields(config: ViTConfig, length: int) -> dict[str, Any]:
    """Return the `config.json` of ViT and DeiT."""
    return (
        fields(config, length)
        | {"qkv_bias": config.attention.bias is True}
        | label_fields(config.classes or 0)
    )


# Tensor names within a layer -----------------------------------------------------------------

HEADS = "(h d) e -> e h d"
QKV = ("query", "key", "value")


def layer(param: str, hf_name: str, names: dict[str, str]) -> list[TensorMapping]:
    """Return the mappings of the layers; `names` has the tensor names by parameter name."""
    rows = [
        *norm(f"{param}/attention_norm", f"{hf_name}.{names['attention_norm']}"),
        *norm(f"{param}/feed_forward_norm", f"{hf_name}.{names['feed_forward_norm']}"),
        TensorMapping(
            f"{param}/attention/out/kernel", f"{hf_name}.{names['out']}.weight", "e (h d) -> h d e"
        ),
        TensorMapping(f"{param}/attention/out/bias", f"{hf_name}.{names['out']}.bias"),
    ]
    for name in QKV:
        rows += linear(f"{param}/attention/{name}", f"{hf_name}.{names[name]}", HEADS)
    for name in ("gate", "up", "down"):
        if name in names:
            gated = "(part f) e -> e f" if "gate" in names and name != "down" else "f e -> e f"
            rows += linear(f"{param}/feed_forward/{name}", f"{hf_name}.{names[name]}", gated)
    return rows


PLAIN = {
    **{name: f"attention.attention.{name}" for name in QKV},
    "attention_norm": "layernorm_before",
    "feed_forward_norm": "layernorm_after",
    "out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
DINO = PLAIN | {"attention_norm": "norm1", "feed_forward_norm": "norm2", "up": "mlp.fc1", "down": "mlp.fc2"}
DINO_GATED = DINO | {"gate": "mlp.weights_in", "up": "mlp.weights_in", "down": "mlp.weights_out"}
TOWER = {
    **{name: f"self_attn.{name[0]}_proj" for name in QKV},
    "attention_norm": "layer_norm1",
    "feed_forward_norm": "layer_norm2",
    "out": "self_attn.out_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


def _tensors(prefix: str, names: dict[str, str]) -> tuple[TensorMapping, ...]:
    """Return the tensor mappings of ViT, DeiT and DINOv2."""
    param, hf_name, embeddings = "layers/{layer}", prefix + "encoder.layer.{layer}", f"{prefix}embeddings"
    return (
        TensorMapping("class_token/table", f"{embeddings}.cls_token", "1 n e -> n e"),
        TensorMapping("distillation_token/table", f"{embeddings}.distillation_token", "1 n e -> n e"),
        TensorMapping("mask_token/table", f"{embeddings}.mask_token"),
        TensorMapping("registers/table", f"{embeddings}.register_tokens", "1 n e -> n e"),
        TensorMapping("position_embedding/table", f"{embeddings}.position_embeddings", "1 n e -> n e"),
        *convolution("patches", f"{embeddings}.patch_embeddings.projection"),
        *layer(param, hf_name, names),
        TensorMapping(f"{param}/attention_layer_scale", f"{hf_name}.layer_scale1.lambda1"),
        TensorMapping(f"{param}/feed_forward_layer_scale", f"{hf_name}.layer_scale2.lambda1"),
        *norm("norm", f"{prefix}layernorm"),
        *linear("pool/dense", f"{prefix}pooler.dense"),
    )


def _classifier(name: str = "", classifier: str = "classifier") -> tuple[TensorMapping, TensorMapping]:
    return (
        TensorMapping(f"{name}readout/table", f"{classifier}.weight"),
        TensorMapping(f"{name}readout_bias/bias", f"{classifier}.bias"),
    )


def deit_tensors(config: ViTConfig) -> tuple[TensorMapping, ...]:
    """Return DeiT's tensor mappings; heads have other names if there are two."""
    rows = _tensors("deit.", PLAIN)
    if not isinstance(config.pooling, Distilled):
        return rows + _classifier()
    second = _classifier("distillation_", "distillation_classifier")
    return rows + _classifier("", "cls_classifier") + second


def dino_tensors(prefix: str) -> Callable[[ViTConfig], tuple[TensorMapping, ...]]:
    """Return a function to DINOv2's tensor mappings; gated layers have other names."""

    def tensors(config: ViTConfig) -> tuple[TensorMapping, ...]:
        gated = isinstance(config.feed_forward, GatedMLPConfig)
        return _tensors(prefix, DINO_GATED if gated else DINO) + _classifier()

    return tensors


def tower(param: str = "", hf_name: str = "vision_model.") -> tuple[TensorMapping, ...]:
    """Return the tensor mappings of CLIP's and SigLIP's image towers."""
    head, fused = f"{hf_name}head", f"{hf_name}head.attention.in_proj_"
    return (
        TensorMapping(f"{param}class_token/table", f"{hf_name}embeddings.class_embedding", "(n e) -> n e"),
        TensorMapping(f"{param}position_embedding/table", f"{hf_name}embeddings.position_embedding.weight"),
        *convolution(f"{param}patches", f"{hf_name}embeddings.patch_embedding"),
        *norm(f"{param}embedding_norm", f"{hf_name}pre_layrnorm"),
        *layer(param + "layers/{layer}", hf_name + "encoder.layers.{layer}", TOWER),
        *norm(f"{param}norm", f"{hf_name}post_layernorm"),
        TensorMapping(f"{param}pool/probe/table", f"{head}.probe", "1 n e -> n e"),
        *(
            TensorMapping(f"{param}pool/attention/{name}/kernel", f"{fused}weight", "(part h d) e -> e h d")
            for name in QKV
        ),
        *(
            TensorMapping(f"{param}pool/attention/{name}/bias", f"{fused}bias", "(part h d) -> h d")
            for name in QKV
        ),
        TensorMapping(
            f"{param}pool/attention/out/kernel", f"{head}.attention.out_proj.weight", "e (h d) -> h d e"
        ),
        TensorMapping(f"{param}pool/attention/out/bias", f"{head}.attention.out_proj.bias"),
        *norm(f"{param}pool/norm", f"{head}.layernorm"),
        *linear(f"{param}pool/feed_forward/up", f"{head}.mlp.fc1"),
        *linear(f"{param}pool/feed_forward/down", f"{head}.mlp.fc2"),
    )


def _named(name: str) -> Callable[[ViTConfig], str]:
    """Return a function from a config to its transformers class with this prefix."""

    def architecture(config: ViTConfig) -> str:
        if isinstance(config.pooling, Distilled):
            return name + DISTILLED
        return name + (CLASSIFIER if config.classes else MODEL)

    return architecture


def _family(config, name: str, prefix: str, tensors, tensors_of=None, fields=None) -> Family:
    ignored = (r".*\.position_ids",)
    return Family(config, tensors, prefix, _named(name), fields, ignored, ViTConfig, tensors_of=tensors_of)


WITH_REGISTERS = "dinov2_with_registers."
FAMILIES = {
    "vit": _family(vit, "ViT", "vit.", _tensors("vit.", PLAIN) + _classifier(), fields=classifier_fields),
    "deit": _family(deit, "DeiT", "deit.", (), deit_tensors, classifier_fields),
    "dinov2": _family(dinov2, "Dinov2", "dinov2.", (), dino_tensors("dinov2.")),
    "dinov2_with_registers": _family(
        dinov2_with_registers, "Dinov2WithRegisters", WITH_REGISTERS, (), dino_tensors(WITH_REGISTERS)
    ),
    "siglip_vision_model": _family(siglip_vision, "SiglipVision", "vision_model.", tower(), fields=fields),
    "clip_vision_model": _family(clip_vision, "CLIPVision", "vision_model.", tower(), fields=fields),
}
