"""Heads and tensor mappings shared by encoder families."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from attnlab.models import (
    ClassifierConfig,
    DenseConfig,
    EncoderConfig,
    FirstToken,
    MaskedLMConfig,
    MeanOfTokens,
    PooledConfig,
)
from attnlab.models.heads import HeadConfig
from attnlab.pretrained.families.base import Family, linear, norm
from attnlab.pretrained.hf_config import HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping

# Suffixes of transformers' class names.
MODEL, MASKED_LM = "Model", "ForMaskedLM"
BIAS = "masked_lm/readout_bias/bias"
DOCUMENTS, TOKENS = "ForSequenceClassification", "ForTokenClassification"


def head(
    hf: HFConfig,
    classes: str,
    *,
    pooler: DenseConfig | None,
    masked: DenseConfig,
    documents: DenseConfig | None,
    tokens: DenseConfig | None = None,
    pooling: FirstToken | MeanOfTokens = FirstToken(),  # noqa: B008 - frozen
    dropouts: tuple[float, float] = (0.0, 0.0),
    bias: bool = True,
) -> HeadConfig:
    """Return the head for the class in a checkpoint's `architectures`.

    Args:
      hf: the checkpoint's config.
      classes: the prefix of the family's class names.
      pooler: the dense layer on the first token of a model without a task head.
      masked: the dense layer before the masked LM logits.
      documents: the dense layer before the document logits.
      tokens: the dense layer before the token logits.
      pooling: how the document classifier pools tokens.
      dropouts: the dropout rates before the document and the token classifier.
      bias: whether the masked LM logits have a bias.
    """
    hf.require("problem_type", None, "single_label_classification")
    labels = len(hf["id2label"]) if hf.get("id2label") else hf.get("num_labels", 2)
    heads: dict[str, HeadConfig] = {
        f"{classes}{MODEL}": PooledConfig(FirstToken(), pooler),
        f"{classes}{MASKED_LM}": MaskedLMConfig(masked, hf.get("tie_word_embeddings", True), bias),
        f"{classes}{DOCUMENTS}": ClassifierConfig(labels, pooling, documents, dropouts[0]),
        f"{classes}{TOKENS}": ClassifierConfig(labels, None, tokens, dropouts[1]),
    }
    hf.require("architectures", *([name] for name in heads))
    return heads[hf["architectures"][0]]


def architecture(classes: str) -> Callable[[EncoderConfig], str]:
    """Return a function from a config to its transformers class with this prefix."""

    def name(config: EncoderConfig) -> str:
        if isinstance(config.head, ClassifierConfig):
            return classes + (DOCUMENTS if config.head.pooling else TOKENS)
        return classes + (MASKED_LM if isinstance(config.head, MaskedLMConfig) else MODEL)

    return name


def tables(hf_name: str) -> tuple[TensorMapping, ...]:
    """Return the mappings of BERT's embeddings: tokens, positions, token types and the norm."""
    return (
        TensorMapping("embedding/table", f"{hf_name}.word_embeddings.weight"),
        TensorMapping("position_embedding/table", f"{hf_name}.position_embeddings.weight"),
        TensorMapping("type_embedding/table", f"{hf_name}.token_type_embeddings.weight"),
        *norm("embedding_norm", f"{hf_name}.LayerNorm"),
    )


def layers(hf_name: str, names: Mapping[str, str]) -> tuple[TensorMapping, ...]:
    """Return the mappings of the layers.

    Args:
      hf_name: the tensor prefix of a layer.
      names: the tensor names within a layer by parameter name.
    """
    param = "layers/{layer}"
    rows = [
        TensorMapping(
            f"{param}/attention/out/kernel", f"{hf_name}.{names['out']}.weight", "e (h d) -> h d e"
        ),
        TensorMapping(f"{param}/attention/out/bias", f"{hf_name}.{names['out']}.bias"),
    ]
    for name in ("query", "key", "value"):
        rows += linear(f"{param}/attention/{name}", f"{hf_name}.{names[name]}", "(h d) e -> e h d")
    for name in ("up", "down"):
        rows += linear(f"{param}/feed_forward/{name}", f"{hf_name}.{names[name]}")
    for name in ("attention_norm", "feed_forward_norm"):
        rows += norm(f"{param}/{name}", f"{hf_name}.{names[name]}")
    return tuple(rows)


def masked_lm(dense: str, dense_norm: str, bias: str, decoder: str) -> tuple[TensorMapping, ...]:
    """Return the mappings of a `MaskedLMConfig`; `decoder` names the output table."""
    return (
        *linear("masked_lm/dense/map", dense),
        *norm("masked_lm/dense/norm", dense_norm),
        TensorMapping("masked_lm/readout/table", f"{decoder}.weight"),
        TensorMapping("masked_lm/readout_bias/bias", bias),
    )


def classifier(param: str, readout: str, dense: str = "", dense_norm: str = "") -> tuple[TensorMapping, ...]:
    """Return the mappings of a `ClassifierConfig`."""
    return (
        *linear(f"{param}/dense/map", dense),
        *norm(f"{param}/dense/norm", dense_norm),
        TensorMapping(f"{param}/readout/table", f"{readout}.weight"),
        TensorMapping(f"{param}/readout_bias/bias", f"{readout}.bias"),
    )


def family(
    config: Callable[[HFConfig], EncoderConfig],
    classes: str,
    prefix: str,
    tensors: tuple[TensorMapping, ...],
    ignored: tuple[str, ...] = (),
    fields: Callable[[EncoderConfig, int], dict] | None = None,
) -> Family:
    """Return a family of encoders; pooler tensors are ignored if the head has no pooler.

    A separate output table has a bias of its own, and transformers ignores that of the head. A tied
    one may have a copy of it.
    """
    named = {row.param: row.hf_name for row in tensors}
    output, head_bias = named["masked_lm/readout/table"], named[BIAS]
    output_bias = f"{output.removesuffix('.weight')}.bias"
    untied = tuple(replace(row, hf_name=output_bias) if row.param == BIAS else row for row in tensors)
    return Family(
        config,
        tensors,
        prefix,
        architecture(classes),
        fields,
        ignored=(r".*\bposition_ids", r".*\bpooler\..*", re.escape(head_bias), *ignored),
        readout=TensorMapping("embedding/table", output),
        copies=tuple(TensorMapping(BIAS, name) for name in (output_bias, head_bias)),
        config_class=EncoderConfig,
        renamed_prefixes=(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
        tensors_of=lambda config: tensors if getattr(config.head, "tied", True) else untied,
    )
