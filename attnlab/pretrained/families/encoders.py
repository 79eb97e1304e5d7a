"""What the checkpoints of encoders have in common: heads by the names of classes, and rows of tables."""

from collections.abc import Callable, Mapping

from attnlab.models import Classifier, Dense, EncoderConfig, FirstToken, MaskedLM, MeanOfTokens, Pooled
from attnlab.models.heads import Head
from attnlab.pretrained.families.base import Family, linear, norm
from attnlab.pretrained.hf_config import Settings
from attnlab.pretrained.table import Tensor

# What the names of transformers' classes end with.
MODEL, MASKED_LM = "Model", "ForMaskedLM"
DOCUMENTS, TOKENS = "ForSequenceClassification", "ForTokenClassification"


def head(
    s: Settings,
    classes: str,
    *,
    pooler: Dense | None,
    masked: Dense,
    documents: Dense | None,
    tokens: Dense | None = None,
    pooling: FirstToken | MeanOfTokens = FirstToken(),  # noqa: B008 - frozen
    dropouts: tuple[float, float] = (0.0, 0.0),
    bias: bool = True,
) -> Head:
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
    heads: dict[str, Head] = {
        f"{classes}{MODEL}": Pooled(FirstToken(), pooler),
        f"{classes}{MASKED_LM}": MaskedLM(masked, s.get("tie_word_embeddings", True), bias),
        f"{classes}{DOCUMENTS}": Classifier(labels, pooling, documents, dropouts[0]),
        f"{classes}{TOKENS}": Classifier(labels, None, tokens, dropouts[1]),
    }
    s.require("architectures", *([name] for name in heads))
    return heads[s["architectures"][0]]


def architecture(classes: str) -> Callable[[EncoderConfig], str]:
    """The class of transformers for a model of a family whose classes' names begin so."""

    def name(config: EncoderConfig) -> str:
        if isinstance(config.head, Classifier):
            return classes + (DOCUMENTS if config.head.pooling else TOKENS)
        return classes + (MASKED_LM if isinstance(config.head, MaskedLM) else MODEL)

    return name


def tables(theirs: str) -> tuple[Tensor, ...]:
    """The tables of tokens, positions and types, and their norm, under the names that BERT has."""
    return (
        Tensor("embedding/table", f"{theirs}.word_embeddings.weight"),
        Tensor("position_embedding/table", f"{theirs}.position_embeddings.weight"),
        Tensor("type_embedding/table", f"{theirs}.token_type_embeddings.weight"),
        *norm("embedding_norm", f"{theirs}.LayerNorm"),
    )


def layers(theirs: str, names: Mapping[str, str]) -> tuple[Tensor, ...]:
    """The rows of the layers.

    Args:
      theirs: what the names of a layer begin with.
      names: how they go on, by our own.
    """
    ours = "layers/{layer}"
    rows = [
        Tensor(f"{ours}/attention/out/kernel", f"{theirs}.{names['out']}.weight", "e (h d) -> h d e"),
        Tensor(f"{ours}/attention/out/bias", f"{theirs}.{names['out']}.bias"),
    ]
    for name in ("query", "key", "value"):
        rows += linear(f"{ours}/attention/{name}", f"{theirs}.{names[name]}", "(h d) e -> e h d")
    for name in ("up", "down"):
        rows += linear(f"{ours}/feed_forward/{name}", f"{theirs}.{names[name]}")
    for name in ("attention_norm", "feed_forward_norm"):
        rows += norm(f"{ours}/{name}", f"{theirs}.{names[name]}")
    return tuple(rows)


def masked_lm(dense: str, dense_norm: str, bias: str, decoder: str = "") -> tuple[Tensor, ...]:
    """The rows of `MaskedLM`, by the names of its parts; `decoder` is that of a table that may be untied."""
    return (
        *linear("masked_lm/dense/map", dense),
        *norm("masked_lm/dense/norm", dense_norm),
        Tensor("masked_lm/readout/table", f"{decoder}.weight"),
        Tensor("masked_lm/readout_bias/bias", bias),
    )


def classifier(ours: str, readout: str, dense: str = "", dense_norm: str = "") -> tuple[Tensor, ...]:
    """The rows of a `Classifier`, by its own name and the names of its parts."""
    return (
        *linear(f"{ours}/dense/map", dense),
        *norm(f"{ours}/dense/norm", dense_norm),
        Tensor(f"{ours}/readout/table", f"{readout}.weight"),
        Tensor(f"{ours}/readout_bias/bias", f"{readout}.bias"),
    )


def family(
    config: Callable[[Settings], EncoderConfig],
    classes: str,
    prefix: str,
    tensors: tuple[Tensor, ...],
    ignored: tuple[str, ...] = (),
    fields: Callable[[EncoderConfig, int], dict] | None = None,
) -> Family:
    """A family of encoders; a pooler is ignored where the head does without."""
    ignored = (r".*\bposition_ids", r".*\bpooler\..*", *ignored)
    older = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    return Family(config, tensors, prefix, architecture(classes), fields, ignored, EncoderConfig, older)
