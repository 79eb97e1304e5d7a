"""The definition of a checkpoint family, and rows that many families share."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from attnlab.models import DecoderConfig, ModelConfig
from attnlab.models.config import TransformerConfig
from attnlab.pretrained.hf_config import HFConfig
from attnlab.pretrained.tensor_mapping import PART, TensorMapping


@dataclass(frozen=True)
class Family:
    """The import and export of one `model_type`: config conversion and tensor names.

    Attributes:
      config: returns the model config for the fields of a `config.json`.
      tensors: the tensor mappings of a model with its head.
      prefix: the prefix that names do not have in a checkpoint without a head.
      architecture: the class of transformers that loads an exported checkpoint, or a function
        from the model config to it if a model can have one of several heads.
      fields: for models trained from scratch: returns the fields of `config.json` for a model
        config and a context length. Export checks that importing them gives an equivalent config.
        None if the family does not support this.
      ignored: regular expressions of tensors to ignore: buffers and heads that are not supported.
      config_class: the class of configs that `fields` accepts.
      renamed_prefixes: pairs of a part of a tensor name and its name in older checkpoints.
      tensors_of: replaces `tensors` if tensor names depend on the config: a function from the model
        config to the mappings.
      optional_zero_tensors: regular expressions of tensors that are zero if absent.
      keep_on_export: for a model that uses only some layers of its checkpoint: a function from the
        model config and the checkpoint's fields to the exported `config.json`.
      readout: the tensor of the output table, and the parameter that it may be tied to.
      copies: other tensors that must equal a parameter if a checkpoint has them.
      always_tied: whether transformers ties the output table if the checkpoint has none, even with
        `tie_word_embeddings=False`.
      tie_fields: fields of `config.json` that say whether the output table is tied; those of a
        nested config as "text_config.tie_word_embeddings".
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
    readout: TensorMapping | None = None
    copies: tuple[TensorMapping, ...] = ()
    always_tied: bool = False
    tie_fields: tuple[str, ...] = ("tie_word_embeddings",)

    def for_config(self, config: ModelConfig) -> "Family":
        """Return the family with the tensor mappings of a model."""
        return self if self.tensors_of is None else replace(self, tensors=self.tensors_of(config))

    def architecture_of(self, config: ModelConfig) -> str:
        """Return the name of the transformers class for a model."""
        return self.architecture if isinstance(self.architecture, str) else self.architecture(config)


def nested_tensors(family: Family, param: str, hf_name: str, bare: bool = False) -> tuple[TensorMapping, ...]:
    """Return the tensor mappings of a model nested in another.

    Args:
      family: the family of the nested model.
      param: the parameter prefix of the nested model.
      hf_name: its tensor prefix in the checkpoint.
      bare: whether the checkpoint has the nested model without its head.
    """
    prefix = family.prefix if bare else ""
    return tuple(
        replace(row, param=f"{param}/{row.param}", hf_name=f"{hf_name}.{row.hf_name.removeprefix(prefix)}")
        for row in family.tensors
    )


def size_fields(config: TransformerConfig) -> dict[str, int]:
    """Return the sizes of a layer stack under the field names of most families."""
    return {
        "num_hidden_layers": config.depth,
        "hidden_size": config.width,
        "num_attention_heads": config.attention.heads,
        "intermediate_size": config.feed_forward.hidden(config.width),
    }


def label_fields(count: int) -> dict[str, dict]:
    """Return the default label names of transformers for `count` classes."""
    names = [f"LABEL_{i}" for i in range(count)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def linear(param: str, hf_name: str, layout: str = "f e -> e f") -> tuple[TensorMapping, TensorMapping]:
    """Return the mappings of a torch Linear, whose weight is (outputs, inputs)."""
    bias = layout.partition(" e ->")[0]
    axes = " ".join(axis for axis in bias.strip("()").split() if axis != PART)
    return (
        TensorMapping(f"{param}/kernel", f"{hf_name}.weight", layout),
        TensorMapping(f"{param}/bias", f"{hf_name}.bias", f"{bias} -> {axes}"),
    )


def convolution(
    param: str, hf_name: str, layout: str = "e c h w -> h w c e"
) -> tuple[TensorMapping, TensorMapping]:
    """Return the mappings of a torch convolution."""
    return TensorMapping(f"{param}/kernel", f"{hf_name}.weight", layout), TensorMapping(
        f"{param}/bias", f"{hf_name}.bias"
    )


def norm(param: str, hf_name: str) -> tuple[TensorMapping, TensorMapping]:
    """Return the mappings of a torch LayerNorm, or of a norm that has only a weight."""
    return TensorMapping(f"{param}/scale", f"{hf_name}.weight"), TensorMapping(
        f"{param}/bias", f"{hf_name}.bias"
    )
