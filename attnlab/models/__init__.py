"""Model families, one file each."""

from attnlab.models.decoder import Decoder, DecoderConfig, Learned

__all__ = ["Decoder", "DecoderConfig", "Learned"]
