"""Vision Transformers: ViT, DeiT, DINOv2 with registers and without, and the towers of CLIP and SigLIP."""

from collections.abc import Callable
from typing import Any

from attnlab.layers import AttentionConfig, GatedMLPConfig, LayerNormConfig, MLPConfig
from attnlab.layers.pooling import ClassAndMean, ClassToken, Distilled, Probe
from attnlab.models import ViTConfig
from attnlab.pretrained.families.base import Family, convolution, label_fields, linear, norm, size_fields
from attnlab.pretrained.hf_config import HF_ACTIVATION_NAMES, HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping

MODEL, CLASSIFIER, DISTILLED = "Model", "ForImageClassification", "ForImageClassificationWithTeacher"


def _common(s: HFConfig, **changes: Any) -> ViTConfig:
    """What the configs of all of them say in the same words."""
    fields = {
        "depth": s["num_hidden_layers"],
        "width": s["hidden_size"],
        "attention": AttentionConfig(
            s["num_attention_heads"],
            bias=True if s.get("qkv_bias", True) else "o",
            dropout=s.get("attention_probs_dropout_prob", s.get("attention_dropout", 0.0)),
        ),
        "norm": LayerNormConfig(s["layer_norm_eps"]),
        "image": (*_pair(s["image_size"]), s["num_channels"]),
        "patch": _pair(s["patch_size"]),
        "classes": 0,
    }
    return ViTConfig(**(fields | changes))


def _pair(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _mlp(s: HFConfig) -> MLPConfig:
    return MLPConfig(s["intermediate_size"], s.activation("hidden_act"))


def _classes(s: HFConfig, name: str, *kinds: str) -> int:
    """Classes of the head; 0 of a model without one, which must be one of these kinds."""
    s.require("architectures", *([f"{name}{kind}"] for kind in kinds))
    s.require("problem_type", None, "single_label_classification")
    if s["architectures"] == [f"{name}{MODEL}"]:
        return 0
    return len(s["id2label"]) if s.get("id2label") else s.get("num_labels", 2)


def vit(s: HFConfig, name: str = "ViT", class_tokens: int = 1) -> ViTConfig:
    """ViT (Dosovitskiy et al. 2020, arXiv 2010.11929, section 3.1); without a head it has a pooler."""
    classes = _classes(s, name, MODEL, CLASSIFIER, *([DISTILLED] if class_tokens == 2 else []))
    if not classes:
        s.require("pooler_act", "tanh")
        s.require("pooler_output_size", None, s["hidden_size"])
    distilled = s["architectures"] == [f"{name}{DISTILLED}"]
    return _common(
        s,
        feed_forward=_mlp(s),
        dropout=s.get("hidden_dropout_prob", 0.0),
        class_tokens=class_tokens,
        pooling=Distilled() if distilled else ClassToken(dense=not classes),
        classes=classes,
    )


def deit(s: HFConfig) -> ViTConfig:
    """DeiT: a ViT with a distillation token (Touvron et al. 2020, arXiv 2012.12877, section 4)."""
    return vit(s, "DeiT", class_tokens=2)


def dinov2(s: HFConfig, name: str = "Dinov2") -> ViTConfig:
    """DINOv2 (Oquab et al. 2023, arXiv 2304.07193): layer scale, and SwiGLU in the largest."""
    s.require("hidden_dropout_prob", 0.0)
    s.require("drop_path_rate", 0.0)
    classes = _classes(s, name, MODEL, CLASSIFIER)
    hidden = int(s["hidden_size"] * s["mlp_ratio"])
    gated = GatedMLPConfig((int(hidden * 2 / 3) + 7) // 8 * 8, bias=True)
    return _common(
        s,
        feed_forward=gated if s.get("use_swiglu_ffn") else MLPConfig(hidden, s.activation("hidden_act")),
        layer_scale=s.get("layerscale_value", 1.0),
        registers=s.get("num_register_tokens", 0),
        mask_token=s.get("use_mask_token", True),
        antialias="num_register_tokens" in s,
        pooling=ClassAndMean() if classes else ClassToken(),
        classes=classes,
    )


def dinov2_with_registers(s: HFConfig) -> ViTConfig:
    """DINOv2 with registers (Darcet et al. 2023, arXiv 2309.16588, section 2.2)."""
    return dinov2(s, "Dinov2WithRegisters")


def siglip_vision(s: HFConfig) -> ViTConfig:
    """SigLIP's tower: no class token, and a probe that pools (Zhai et al. 2023, arXiv 2303.15343)."""
    s.require("vision_use_head", True)
    return _common(s, feed_forward=_mlp(s), class_tokens=0, pooling=Probe())


def clip_vision(s: HFConfig) -> ViTConfig:
    """CLIP's tower: a norm before the layers too (Radford et al. 2021, arXiv 2103.00020, section 2.4)."""
    return _common(s, feed_forward=_mlp(s), patch_bias=False, embedding_norm=True)


def fields(config: ViTConfig, length: int) -> dict[str, Any]:
    """What the `config.json` of all of them says in the same words, which is all that a tower's says."""
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
    """A number where both sides are the same, which is all that a tower can be told."""
    return pair[0] if pair[0] == pair[1] else list(pair)


def classifier_fields(config: ViTConfig, length: int) -> dict[str, Any]:
    """What that of ViT and DeiT says."""
    return (
        fields(config, length)
        | {"qkv_bias": config.attention.bias is True}
        | label_fields(config.classes or 0)
    )


# Their names of a layer's parts -----------------------------------------------------------------------------

HEADS = "(h d) e -> e h d"
QKV = ("query", "key", "value")


def layer(param: str, hf_name: str, names: dict[str, str]) -> list[TensorMapping]:
    """The rows of a stack's layers, by their names of our parts."""
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
    """The table of ViT, DeiT and DINOv2."""
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
    """DeiT's table: a head is named otherwise where there are two."""
    rows = _tensors("deit.", PLAIN)
    if not isinstance(config.pooling, Distilled):
        return rows + _classifier()
    second = _classifier("distillation_", "distillation_classifier")
    return rows + _classifier("", "cls_classifier") + second


def dino_tensors(prefix: str) -> Callable[[ViTConfig], tuple[TensorMapping, ...]]:
    """DINOv2's table: gated layers have names of their own."""

    def tensors(config: ViTConfig) -> tuple[TensorMapping, ...]:
        gated = isinstance(config.feed_forward, GatedMLPConfig)
        return _tensors(prefix, DINO_GATED if gated else DINO) + _classifier()

    return tensors


def tower(param: str = "", hf_name: str = "vision_model.") -> tuple[TensorMapping, ...]:
    """The table of CLIP's and SigLIP's towers."""
    head, joined = f"{hf_name}head", f"{hf_name}head.attention.in_proj_"
    return (
        TensorMapping(f"{param}class_token/table", f"{hf_name}embeddings.class_embedding", "(n e) -> n e"),
        TensorMapping(f"{param}position_embedding/table", f"{hf_name}embeddings.position_embedding.weight"),
        *convolution(f"{param}patches", f"{hf_name}embeddings.patch_embedding"),
        *norm(f"{param}embedding_norm", f"{hf_name}pre_layrnorm"),
        *layer(param + "layers/{layer}", hf_name + "encoder.layers.{layer}", TOWER),
        *norm(f"{param}norm", f"{hf_name}post_layernorm"),
        TensorMapping(f"{param}pool/probe/table", f"{head}.probe", "1 n e -> n e"),
        *(
            TensorMapping(f"{param}pool/attention/{name}/kernel", f"{joined}weight", "(part h d) e -> e h d")
            for name in QKV
        ),
        *(
            TensorMapping(f"{param}pool/attention/{name}/bias", f"{joined}bias", "(part h d) -> h d")
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
    """The class of transformers for a model of a family whose classes' names begin so."""

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
