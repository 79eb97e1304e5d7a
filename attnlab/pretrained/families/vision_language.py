"""LLaVA and PaliGemma: decoders that take image patches as tokens."""

from dataclasses import replace
from functools import partial
from typing import Any

from attnlab.models import ProjectorConfig, VisionLanguageConfig
from attnlab.pretrained.families import llama, vit
from attnlab.pretrained.families.base import Family, linear, nested_tensors
from attnlab.pretrained.families.contrastive import CLIP_IMAGE, SIGLIP_IMAGE
from attnlab.pretrained.hf_config import HF_ACTIVATION_NAMES, HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping

# Defaults of transformers' config classes, which older nested configs omit.
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "vocab_size": 32000,
}
GEMMA = {"head_dim": 256, "rms_norm_eps": 1e-6}


def llava(hf: HFConfig) -> VisionLanguageConfig:
    """LLaVA 1.5: a layer of CLIP's tower, an MLP and Llama (Liu et al. 2023, arXiv 2310.03744)."""
    image, text = hf.part("vision_config", CLIP_IMAGE), hf.part("text_config", LLAMA)
    image.require("model_type", "clip_vision_model")
    text.require("model_type", "llama")
    tied = hf.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    hf.require("vision_feature_select_strategy", "default")
    encoder, layer = vit.clip_vision(image), hf.get("vision_feature_layer", -2)
    hf.require("vision_feature_layer", *range(-encoder.depth, 0), *range(1, encoder.depth + 1))
    return VisionLanguageConfig(
        encoder=replace(encoder, depth=layer if layer > 0 else encoder.depth + 1 + layer),
        decoder=replace(llama.llama(text), tied=tied),
        projector=ProjectorConfig(
            hf.activation("projector_hidden_act"), hf.get("multimodal_projector_bias", True)
        ),
        encoder_final_norm=False,
        image_token_id=hf["image_token_index"],
        generation=hf.generation_defaults(),
    )


def keep_on_export(config: VisionLanguageConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """Return LLaVA's `config.json` with only the used layers of the tower.

    The selected feature layer is then the last one.
    """
    tower = fields["vision_config"] | {"num_hidden_layers": config.encoder.depth}
    return fields | {"vision_config": tower, "vision_feature_layer": -1}


def paligemma(hf: HFConfig) -> VisionLanguageConfig:
    """PaliGemma: SigLIP's tower, a projection and a prefix-LM Gemma (arXiv 2407.07726)."""
    image = hf.part("vision_config", SIGLIP_IMAGE)
    image.require("model_type", "siglip_vision_model")
    image.require("vision_use_head", False)
    text = hf.part("text_config", GEMMA)
    text.require("model_type", "gemma")
    text.require("use_bidirectional_attention", None, True)
    decoder = replace(llama.gemma(text), tied=hf.get("tie_word_embeddings", True))
    hf.require("projection_dim", decoder.width)
    return VisionLanguageConfig(
        encoder=vit.siglip_vision(hf.part("vision_config", SIGLIP_IMAGE, vision_use_head=True)),
        decoder=decoder,
        image_token_id=hf["image_token_index"],
        prompt_suffix="\n",
        bidirectional_prompt=True,
        generation=hf.generation_defaults(hf.get("bos_token_id", text.get("bos_token_id"))),
    )


def fields(config: VisionLanguageConfig, length: int, vision: str, text: str) -> dict[str, Any]:
    """Return the `config.json` of both for a model with these encoder and decoder types."""
    encoder, decoder, projector = config.encoder, config.decoder, config.projector
    start = config.generation.decoder_start_token_id
    return {
        "vision_config": {"model_type": vision, "vision_use_head": False, **vit.fields(encoder, length)},
        "text_config": {"model_type": text, **llama.fields(decoder, length)},
        **({} if start is None else {"bos_token_id": start}),
        "image_token_index": decoder.vocab_size if config.image_token_id is None else config.image_token_id,
        "vision_feature_layer": -1,
        "projector_hidden_act": HF_ACTIVATION_NAMES.get(projector.activation or ""),
        "multimodal_projector_bias": projector.bias,
        "projection_dim": decoder.width,
        "hidden_size": decoder.width,
        "tie_word_embeddings": decoder.tied,
    }


def _family(
    config,
    architecture: str,
    vision: str,
    decoder: str,
    projector: tuple[TensorMapping, ...],
    *ignored: str,
    keep_on_export=None,
) -> Family:
    text = llama.FAMILIES[decoder]
    rows = (
        vit.tower("encoder/", "vision_tower."),
        projector,
        nested_tensors(text, "decoder", "language_model"),
    )
    return Family(
        config,
        tuple(row for part in rows for row in part),
        prefix="",
        architecture=architecture,
        ignored=(*ignored, r".*\.(rotary_emb\.inv_freq|position_ids)"),
        readout=TensorMapping("decoder/embedding/table", "language_model.lm_head.weight"),
        tie_fields=("tie_word_embeddings", "text_config.tie_word_embeddings"),
        config_class=VisionLanguageConfig,
        fields=partial(fields, vision=vision, text=decoder),
        renamed_prefixes=(("vision_tower.", "vision_tower.vision_model."),),
        keep_on_export=keep_on_export,
    )


LINEAR = "multi_modal_projector.linear"
FAMILIES = {
    "llava": _family(
        llava,
        "LlavaForConditionalGeneration",
        "clip_vision_model",
        "llama",
        (*linear("projection", f"{LINEAR}_1"), *linear("projection_out", f"{LINEAR}_2")),
        # Layers of the tower after the selected feature layer.
        r"vision_tower\.(vision_model\.)?encoder\.layers\..*",
        keep_on_export=keep_on_export,
    ),
    "paligemma": _family(
        paligemma,
        "PaliGemmaForConditionalGeneration",
        "siglip_vision_model",
        "gemma",
        linear("projection", LINEAR),
    ),
}
