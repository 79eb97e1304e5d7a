"""Model families, one file each."""

from attnlab.models.base import ModelConfig, TokenFlops, TransformerConfig
from attnlab.models.decoder import Decoder, DecoderConfig, Learned

__all__ = ["Decoder", "DecoderConfig", "Learned", "ModelConfig", "TokenFlops", "TransformerConfig"]
