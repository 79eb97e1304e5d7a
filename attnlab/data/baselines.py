"""Compression baselines for the loss of a language model."""

import bz2
import lzma

from attnlab.data.base import Data


def compressed_bits_per_byte(data: Data) -> dict[str, float]:
    """Return the bits per byte of bz2 and xz at their highest level on the validation texts.

    The texts are joined by newlines.
    """
    text = "\n".join(data.text(record) for record in data.records("validation")).encode()
    packed = {"bz2": bz2.compress(text, 9), "xz": lzma.compress(text, preset=9)}
    return {name: 8 * len(content) / len(text) for name, content in packed.items()}
