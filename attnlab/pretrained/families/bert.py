"""BERT, and encoders whose layers have its names: RoBERTa and its kin, and ELECTRA."""

from collections.abc import Callable
from typing import Any

from attnlab.layers import AttentionConfig, LayerNormConfig, MLPConfig
from attnlab.models import ClassifierConfig, DenseConfig, EncoderConfig, Learned
from attnlab.models.heads import HeadConfig
from attnlab.pretrained.families.base import label_fields, linear, size_fields
from attnlab.pretrained.families.encoders import (
    classifier,
    family,
    head,
    layers,
    masked_lm,
    tables,
)
from attnlab.pretrained.hf_config import HF_ACTIVATION_NAMES, HFConfig

POOLER = DenseConfig("tanh")


def encoder(s: HFConfig, head: HeadConfig, **changes: Any) -> EncoderConfig:
    """What BERT and its kin have in common; `changes` are fields that one has otherwise."""
    s.require("position_embedding_type", "absolute")
    s.require("is_decoder", False)
    s.require("add_cross_attention", False)
    s.require("pruned_heads", None, {})
    config: dict[str, Any] = {
        "depth": s["num_hidden_layers"],
        "width": s["hidden_size"],
        "attention": AttentionConfig(
            s["num_attention_heads"], bias=True, dropout=s.get("attention_probs_dropout_prob", 0.0)
        ),
        "feed_forward": MLPConfig(s["intermediate_size"], s.activation("hidden_act")),
        "norm": LayerNormConfig(s.get("layer_norm_eps", 1e-12)),
        "placement": "post",
        "positions": Learned(s["max_position_embeddings"]),
        "vocab_size": s["vocab_size"],
        "embedding_norm": True,
        "token_types": s["type_vocab_size"],
        "head": head,
        "dropout": s.get("hidden_dropout_prob", 0.0),
    }
    return EncoderConfig(**config | changes)


def dropouts(s: HFConfig) -> tuple[float, float]:
    """Of what the logits of documents, and of tokens, are read from."""
    return (s.get("classifier_dropout", s.get("hidden_dropout_prob", 0.0)),) * 2


def bert(s: HFConfig) -> EncoderConfig:
    """BERT (Devlin et al. 2018, arXiv 1810.04805, section 3)."""
    s.require("tie_word_embeddings", True)
    masked = DenseConfig(s.activation("hidden_act"), norm=True)
    return encoder(s, head(s, "Bert", pooler=POOLER, masked=masked, documents=POOLER, dropouts=dropouts(s)))


def fields(config: EncoderConfig, length: int) -> dict[str, Any]:
    """What BERT's `config.json` says of an encoder."""
    positions = config.positions.length if isinstance(config.positions, Learned) else length
    count = config.head.labels if isinstance(config.head, ClassifierConfig) else 2
    return {
        **size_fields(config),
        "hidden_act": HF_ACTIVATION_NAMES.get(config.feed_forward.activation),
        "layer_norm_eps": config.norm.epsilon,
        "max_position_embeddings": positions,
        "type_vocab_size": config.token_types,
        "vocab_size": config.vocab_size,
        **label_fields(count),
    }


def roberta(classes: str) -> Callable[[HFConfig], EncoderConfig]:
    """The config function of RoBERTa or one of its kin, by what the names of its classes begin with."""

    def config(s: HFConfig) -> EncoderConfig:
        """RoBERTa (Liu et al. 2019, arXiv 1907.11692, section 3); positions come after the padding's."""
        s.require("tie_word_embeddings", True)
        masked = DenseConfig("gelu_exact", norm=True)
        model_head = head(s, classes, pooler=POOLER, masked=masked, documents=POOLER, dropouts=dropouts(s))
        offset = s.get("pad_token_id", 1) + 1
        return encoder(s, model_head, positions=Learned(s["max_position_embeddings"], offset))

    return config


def electra(s: HFConfig) -> EncoderConfig:
    """ELECTRA (Clark et al. 2020, arXiv 2003.10555, section 3.2): narrower tables, no pooler."""
    exact, masked = DenseConfig("gelu_exact"), DenseConfig("gelu_exact", norm=True)
    model_head = head(s, "Electra", pooler=None, masked=masked, documents=exact, dropouts=dropouts(s))
    narrow = s["embedding_size"] if s["embedding_size"] != s["hidden_size"] else None
    return encoder(s, model_head, embedding_width=narrow)


NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}
WORDS = "cls.predictions"
BERT = (
    *tables("bert.embeddings"),
    *layers("bert.encoder.layer.{layer}", NAMES),
    *linear("pooled/dense/map", "bert.pooler.dense"),
    *masked_lm(f"{WORDS}.transform.dense", f"{WORDS}.transform.LayerNorm", f"{WORDS}.bias"),
    *classifier("document_labels", "classifier", "bert.pooler.dense"),
    *classifier("token_labels", "classifier"),
)
ROBERTA = (
    *tables("roberta.embeddings"),
    *layers("roberta.encoder.layer.{layer}", NAMES),
    *linear("pooled/dense/map", "roberta.pooler.dense"),
    *masked_lm("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    *classifier("document_labels", "classifier.out_proj", "classifier.dense"),
    *classifier("token_labels", "classifier"),
)
GENERATOR = "generator_predictions"
ELECTRA = (
    *tables("electra.embeddings"),
    *linear("projection", "electra.embeddings_project"),
    *layers("electra.encoder.layer.{layer}", NAMES),
    *masked_lm(f"{GENERATOR}.dense", f"{GENERATOR}.LayerNorm", "generator_lm_head.bias", "generator_lm_head"),
    *classifier("document_labels", "classifier.out_proj", "classifier.dense"),
    *classifier("token_labels", "classifier"),
)
COPIES = r"lm_head\.decoder\.(weight|bias)"
FAMILIES = {
    # The head that told whether a sentence follows another has no part in any of these.
    "bert": family(
        bert,
        "Bert",
        "bert.",
        BERT,
        (r"cls\.predictions\.decoder\.(weight|bias)", r"cls\.seq_relationship\.(weight|bias)"),
        fields,
    ),
    "roberta": family(roberta("Roberta"), "Roberta", "roberta.", ROBERTA, (COPIES,)),
    "xlm-roberta": family(roberta("XLMRoberta"), "XLMRoberta", "roberta.", ROBERTA, (COPIES,)),
    "camembert": family(roberta("Camembert"), "Camembert", "roberta.", ROBERTA, (COPIES,)),
    "electra": family(electra, "Electra", "electra.", ELECTRA, (r"generator_lm_head\.weight",)),
}
