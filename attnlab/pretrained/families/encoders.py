"""What the checkpoints of encoders have in common: heads by the names of classes, and rows of tables."""

from collections.abc import Callable, Mapping

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

# What the names of transformers' classes end with.
MODEL, MASKED_LM = "Model", "ForMaskedLM"
DOCUMENTS, TOKENS = "ForSequenceClassification", "ForTokenClassification"


def head(
    s: HFConfig,
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
    """The head that a checkpoint's `architectures` names.

    Args:
      s: its settings.
      classes: what the names of the family's classes begin with.
      pooler: what the first token goes through in a model without logits.
      masked: what stands before the logits of masked tokens.
      documents: what stands before the logits of documents.
      tokens: what stands before the logits of tokens.
      pooling: of documents, for their logits.
      dropouts: of what logits of documents, and of tokens, are read from.
      bias: whether the logits of masked tokens have one.
    """
    s.require("problem_type", None, "single_label_classification")
    labels = len(s["id2label"]) if s.get("id2label") else s.get("num_labels", 2)
    heads: dict[str, HeadConfig] = {
        f"{classes}{MODEL}": PooledConfig(FirstToken(), pooler),
        f"{classes}{MASKED_LM}": MaskedLMConfig(masked, s.get("tie_word_embeddings", True), bias),
        f"{classes}{DOCUMENTS}": ClassifierConfig(labels, pooling, documents, dropouts[0]),
        f"{classes}{TOKENS}": ClassifierConfig(labels, None, tokens, dropouts[1]),
    }
    s.require("architectures", *([name] for name in heads))
    return heads[s["architectures"][0]]


def architecture(classes: str) -> Callable[[EncoderConfig], str]:
    """The class of transformers for a model of a family whose classes' names begin so."""

    def name(config: EncoderConfig) -> str:
        if isinstance(config.head, ClassifierConfig):
            return classes + (DOCUMENTS if config.head.pooling else TOKENS)
        return classes + (MASKED_LM if isinstance(config.head, MaskedLMConfig) else MODEL)

    return name


def tables(hf_name: str) -> tuple[TensorMapping, ...]:
    """The tables of tokens, positions and types, and their norm, under the names that BERT has."""
    return (
        TensorMapping("embedding/table", f"{hf_name}.word_embeddings.weight"),
        TensorMapping("position_embedding/table", f"{hf_name}.position_embeddings.weight"),
        TensorMapping("type_embedding/table", f"{hf_name}.token_type_embeddings.weight"),
        *norm("embedding_norm", f"{hf_name}.LayerNorm"),
    )


def layers(hf_name: str, names: Mapping[str, str]) -> tuple[TensorMapping, ...]:
    """The rows of the layers.

    Args:
      hf_name: what the names of a layer begin with.
      names: how they go on, by our own.
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


def masked_lm(dense: str, dense_norm: str, bias: str, decoder: str = "") -> tuple[TensorMapping, ...]:
    """The rows of `MaskedLMConfig`, by the names of its parts; `decoder` is a table that may be untied."""
    return (
        *linear("masked_lm/dense/map", dense),
        *norm("masked_lm/dense/norm", dense_norm),
        TensorMapping("masked_lm/readout/table", f"{decoder}.weight"),
        TensorMapping("masked_lm/readout_bias/bias", bias),
    )


def classifier(param: str, readout: str, dense: str = "", dense_norm: str = "") -> tuple[TensorMapping, ...]:
    """The rows of a `ClassifierConfig`, by its own name and the names of its parts."""
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
    """A family of encoders; a pooler is ignored where the head does without."""
    ignored = (r".*\bposition_ids", r".*\bpooler\..*", *ignored)
    renamed_prefixes = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    return Family(
        config, tensors, prefix, architecture(classes), fields, ignored, EncoderConfig, renamed_prefixes
    )
