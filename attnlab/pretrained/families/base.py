"""What a family of checkpoints must say of itself."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from attnlab.models import DecoderConfig, ModelConfig
from attnlab.models.base import TransformerConfig
from attnlab.pretrained.hf_config import HFConfig
from attnlab.pretrained.tensor_mapping import PART, TensorMapping


@dataclass(frozen=True)
class Family:
    """Checkpoints of one `model_type`: their config in our words, and their tensors' names.

    Attributes:
      config: the model's config from the fields of `config.json`.
      tensors: the table of names, as in a model with its head.
      prefix: what names lack in a checkpoint of a model without its head.
      architecture: the class of transformers that an exported checkpoint loads as; a function of the model's
        config where a model may have one of several heads.
      fields: of `config.json`, for a model that was made here and a context of so many tokens, where the
        family may be able to say what it is. Whether it is, is seen by reading them back.
      ignored: regular expressions of tensors that mean nothing: buffers, and copies of tied tables.
      config_class: the class of configs that `fields` accepts.
      renamed_prefixes: parts of names, and what older checkpoints have in their place.
      tensors_of: the table of a model with this config, where names depend on it; it stands in for `tensors`.
      optional_zero_tensors: regular expressions of tensors that are zero where a checkpoint has none.
      keep_on_export: for a model that leaves out some layers of its checkpoint, the exported `config.json`,
        made of the model's config and the checkpoint's fields.
    """

    config: Callable[[HFConfig], ModelConfig]
    tensors: tuple[TensorMapping, ...]
    prefix: str
    architecture: str | Callable[[Any], str]
    fields: Callable[[Any, int], dict[str, Any]] | None = None
    ignored: tuple[str, ...] = ()
    config_class: type[ModelConfig] = DecoderConfig
    renamed_prefixes: tuple[tuple[str, str], ...] = ()
    tensors_of: Callable[[Any], tuple[TensorMapping, ...]] | None = None
    optional_zero_tensors: tuple[str, ...] = ()
    keep_on_export: Callable[[Any, dict[str, Any]], dict[str, Any]] | None = None

    def for_config(self, config: ModelConfig) -> "Family":
        """With the table of names of a model."""
        return self if self.tensors_of is None else replace(self, tensors=self.tensors_of(config))

    def architecture_of(self, config: ModelConfig) -> str:
        """The class of transformers for a model."""
        return self.architecture if isinstance(self.architecture, str) else self.architecture(config)


def nested_tensors(family: Family, param: str, hf_name: str, bare: bool = False) -> tuple[TensorMapping, ...]:
    """The table of a family's model that is a part of another.

    Args:
      family: of the part.
      param: the part's name.
      hf_name: the same there.
      bare: whether it is there without its head.
    """
    prefix = family.prefix if bare else ""
    return tuple(
        replace(row, param=f"{param}/{row.param}", hf_name=f"{hf_name}.{row.hf_name.removeprefix(prefix)}")
        for row in family.tensors
    )


def size_fields(config: TransformerConfig) -> dict[str, int]:
    """The sizes of a stack of layers, as most `config.json` files say them."""
    return {
        "num_hidden_layers": config.depth,
        "hidden_size": config.width,
        "num_attention_heads": config.attention.heads,
        "intermediate_size": config.feed_forward.hidden(config.width),
    }


def label_fields(count: int) -> dict[str, dict]:
    """The names of so many classes, as transformers gives them."""
    names = [f"LABEL_{i}" for i in range(count)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def linear(param: str, hf_name: str, layout: str = "f e -> e f") -> tuple[TensorMapping, TensorMapping]:
    """Weight and bias of a torch Linear, whose weight is (outputs, inputs)."""
    bias = layout.partition(" e ->")[0]
    axes = " ".join(axis for axis in bias.strip("()").split() if axis != PART)
    return (
        TensorMapping(f"{param}/kernel", f"{hf_name}.weight", layout),
        TensorMapping(f"{param}/bias", f"{hf_name}.bias", f"{bias} -> {axes}"),
    )


def convolution(
    param: str, hf_name: str, layout: str = "e c h w -> h w c e"
) -> tuple[TensorMapping, TensorMapping]:
    """Weight and bias of a torch convolution."""
    return TensorMapping(f"{param}/kernel", f"{hf_name}.weight", layout), TensorMapping(
        f"{param}/bias", f"{hf_name}.bias"
    )


def norm(param: str, hf_name: str) -> tuple[TensorMapping, TensorMapping]:
    """Weight and bias of a torch LayerNorm, or the weight of a norm that has no other."""
    return TensorMapping(f"{param}/scale", f"{hf_name}.weight"), TensorMapping(
        f"{param}/bias", f"{hf_name}.bias"
    )
