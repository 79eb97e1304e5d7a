"""ALBERT: BERT with shared layer parameters and factorized embeddings."""

from attnlab.layers import Bidirectional
from attnlab.models import DenseConfig, EncoderConfig
from attnlab.pretrained.families.base import linear
from attnlab.pretrained.families.bert import POOLER, encoder
from attnlab.pretrained.families.encoders import classifier, family, head, layers, masked_lm, tables
from attnlab.pretrained.hf_config import HFConfig


def albert(hf: HFConfig) -> EncoderConfig:
    """ALBERT (Lan et al. 2019, arXiv 1909.11942, section 3.1)."""
    masked = DenseConfig(hf.activation("hidden_act"), norm=True)
    dropouts = (hf.get("classifier_dropout_prob", 0.1),) * 2
    inner = hf.get("inner_group_num", 1)
    return encoder(
        hf,
        head(hf, "Albert", pooler=POOLER, masked=masked, documents=POOLER, dropouts=dropouts),
        depth=hf["num_hidden_layers"] * inner,
        pattern=(Bidirectional(),) * inner,
        num_param_groups=hf.get("num_hidden_groups", 1),
        embedding_width=hf["embedding_size"],
    )


NAMES = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "out": "attention.dense",
    "attention_norm": "attention.LayerNorm",
    "up": "ffn",
    "down": "ffn_output",
    "feed_forward_norm": "full_layer_layer_norm",
}
TENSORS = (
    *tables("albert.embeddings"),
    *linear("projection", "albert.encoder.embedding_hidden_mapping_in"),
    *layers("albert.encoder.albert_layer_groups.{period}.albert_layers.{block}", NAMES),
    *linear("pooled/dense/map", "albert.pooler"),
    *masked_lm("predictions.dense", "predictions.LayerNorm", "predictions.bias", "predictions.decoder"),
    *classifier("document_labels", "classifier", "albert.pooler"),
    *classifier("token_labels", "classifier"),
)
IGNORED = (r"sop_classifier\.classifier\.(weight|bias)",)
FAMILIES = {"albert": family(albert, "Albert", "albert.", TENSORS, IGNORED)}
