"""Checkpoint families by the `model_type` of `config.json`."""

from attnlab.pretrained.families import (
    albert,
    bart,
    bert,
    captioner,
    contrastive,
    distilbert,
    gpt2,
    llama,
    mixtures,
    modernbert,
    starcoder2,
    t5,
    vision_language,
    vit,
    whisper,
)
from attnlab.pretrained.families.base import Family

FAMILIES: dict[str, Family] = {
    **gpt2.FAMILIES,
    **llama.FAMILIES,
    **mixtures.FAMILIES,
    **starcoder2.FAMILIES,
    **bert.FAMILIES,
    **albert.FAMILIES,
    **distilbert.FAMILIES,
    **modernbert.FAMILIES,
    **t5.FAMILIES,
    **bart.FAMILIES,
    **vit.FAMILIES,
    **contrastive.FAMILIES,
    **whisper.FAMILIES,
    **captioner.FAMILIES,
    **vision_language.FAMILIES,
}

__all__ = ["FAMILIES", "Family"]
