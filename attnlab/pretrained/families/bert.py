"""BERT, and encoders with BERT's layer names: RoBERTa, XLM-R, CamemBERT and ELECTRA."""

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


def encoder(hf: HFConfig, head: HeadConfig, **changes: Any) -> EncoderConfig:
    """Return the encoder config that BERT-like models share; `changes` replace fields."""
    hf.require("position_embedding_type", "absolute")
    hf.require("is_decoder", False)
    hf.require("add_cross_attention", False)
    hf.require("pruned_heads", None, {})
    config: dict[str, Any] = {
        "depth": hf["num_hidden_layers"],
        "width": hf["hidden_size"],
        "attention": AttentionConfig(
            hf["num_attention_heads"], bias=True, dropout=hf.get("attention_probs_dropout_prob", 0.0)
        ),
        "feed_forward": MLPConfig(hf["intermediate_size"], hf.activation("hidden_act")),
        "norm": LayerNormConfig(hf.get("layer_norm_eps", 1e-12)),
        "placement": "post",
        "positions": Learned(hf["max_position_embeddings"]),
        "vocab_size": hf["vocab_size"],
        "embedding_norm": True,
        "token_types": hf["type_vocab_size"],
        "head": head,
        "dropout": hf.get("hidden_dropout_prob", 0.0),
    }
    return EncoderConfig(**config | changes)


def dropouts(hf: HFConfig) -> tuple[float, float]:
    """Return the dropout rates before the document and the token classifier."""
    return (hf.get("classifier_dropout", hf.get("hidden_dropout_prob", 0.0)),) * 2


def bert(hf: HFConfig) -> EncoderConfig:
    """BERT (Devlin et al. 2018, arXiv 1810.04805, section 3)."""
    masked = DenseConfig(hf.activation("hidden_act"), norm=True)
    return encoder(
        hf, head(hf, "Bert", pooler=POOLER, masked=masked, documents=POOLER, dropouts=dropouts(hf))
    )


def fields(config: EncoderConfig, length: int) -> dict[str, Any]:
    """Return BERT's `config.json` for an encoder."""
    positions = config.positions.length if isinstance(config.positions, Learned) else length
    count = config.head.labels if isinstance(config.head, ClassifierConfig) else 2
    return {
        **size_fields(config),
        "hidden_act": HF_ACTIVATION_NAMES.get(config.feed_forward.activation),
        "layer_norm_eps": config.norm.epsilon,
        "max_position_embeddings": positions,
        "type_vocab_size": config.token_types,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": getattr(config.head, "tied", True),
        **label_fields(count),
    }


def roberta(classes: str) -> Callable[[HFConfig], EncoderConfig]:
    """Return the config function of a RoBERTa-like model with this class name prefix."""

    def config(hf: HFConfig) -> EncoderConfig:
        """RoBERTa (Liu et al. 2019, arXiv 1907.11692, section 3).

        Position ids start after the padding id.
        """
        masked = DenseConfig("gelu_exact", norm=True)
        model_head = head(hf, classes, pooler=POOLER, masked=masked, documents=POOLER, dropouts=dropouts(hf))
        offset = hf.get("pad_token_id", 1) + 1
        return encoder(hf, model_head, positions=Learned(hf["max_position_embeddings"], offset))

    return config


def electra(hf: HFConfig) -> EncoderConfig:
    """ELECTRA (Clark et al. 2020, arXiv 2003.10555, section 3.2): no pooler.

    The embeddings may be narrower than the layers.
    """
    exact, masked = DenseConfig("gelu_exact"), DenseConfig("gelu_exact", norm=True)
    model_head = head(hf, "Electra", pooler=None, masked=masked, documents=exact, dropouts=dropouts(hf))
    narrow = hf["embedding_size"] if hf["embedding_size"] != hf["hidden_size"] else None
    return encoder(hf, model_head, embedding_width=narrow)


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
MASKED_LM = "cls.predictions"
BERT = (
    *tables("bert.embeddings"),
    *layers("bert.encoder.layer.{layer}", NAMES),
    *linear("pooled/dense/map", "bert.pooler.dense"),
    *masked_lm(
        f"{MASKED_LM}.transform.dense",
        f"{MASKED_LM}.transform.LayerNorm",
        f"{MASKED_LM}.bias",
        f"{MASKED_LM}.decoder",
    ),
    *classifier("document_labels", "classifier", "bert.pooler.dense"),
    *classifier("token_labels", "classifier"),
)
ROBERTA = (
    *tables("roberta.embeddings"),
    *layers("roberta.encoder.layer.{layer}", NAMES),
    *linear("pooled/dense/map", "roberta.pooler.dense"),
    *masked_lm("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder"),
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
FAMILIES = {
    # The next-sentence head is ignored.
    "bert": family(
        bert,
        "Bert",
        "bert.",
        BERT,
        (r"cls\.seq_relationship\.(weight|bias)",),
        fields,
    ),
    "roberta": family(roberta("Roberta"), "Roberta", "roberta.", ROBERTA),
    "xlm-roberta": family(roberta("XLMRoberta"), "XLMRoberta", "roberta.", ROBERTA),
    "camembert": family(roberta("Camembert"), "Camembert", "roberta.", ROBERTA),
    "electra": family(electra, "Electra", "electra.", ELECTRA),
}
