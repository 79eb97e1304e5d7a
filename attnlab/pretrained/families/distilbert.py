"""DistilBERT: BERT without token types and without a pooler."""

from attnlab.layers import AttentionConfig, LayerNormConfig, MLPConfig
from attnlab.models import DenseConfig, EncoderConfig, Learned
from attnlab.pretrained.families.encoders import classifier, family, head, layers, masked_lm, tables
from attnlab.pretrained.hf_config import HFConfig


def distilbert(hf: HFConfig) -> EncoderConfig:
    """DistilBERT (Sanh et al. 2019, arXiv 1910.01108, section 3)."""
    activation, dropout = hf.activation("activation"), hf.get("dropout", 0.1)
    return EncoderConfig(
        depth=hf["n_layers"],
        width=hf["dim"],
        attention=AttentionConfig(hf["n_heads"], bias=True, dropout=hf.get("attention_dropout", 0.1)),
        feed_forward=MLPConfig(hf["hidden_dim"], activation),
        norm=LayerNormConfig(1e-12),
        placement="post",
        positions=Learned(hf["max_position_embeddings"]),
        vocab_size=hf["vocab_size"],
        embedding_norm=True,
        head=head(
            hf,
            "DistilBert",
            pooler=None,
            masked=DenseConfig(activation, norm=True),
            documents=DenseConfig("relu"),
            dropouts=(hf.get("seq_classif_dropout", 0.2), dropout),
        ),
        dropout=dropout,
    )


NAMES = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "out": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "feed_forward_norm": "output_layer_norm",
}
TENSORS = (
    *tables("distilbert.embeddings"),
    *layers("distilbert.transformer.layer.{layer}", NAMES),
    *masked_lm("vocab_transform", "vocab_layer_norm", "vocab_projector.bias", "vocab_projector"),
    *classifier("document_labels", "classifier", "pre_classifier"),
    *classifier("token_labels", "classifier"),
)
FAMILIES = {"distilbert": family(distilbert, "DistilBert", "distilbert.", TENSORS)}
