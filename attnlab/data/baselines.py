"""What a general compressor makes of the validation text: a floor to compare a model's loss with."""

import bz2
import lzma

from attnlab.data.base import Data


def compressed_bits_per_byte(data: Data) -> dict[str, float]:
    """Bits per byte of bz2 and xz, both at their strongest, on all validation texts joined by newlines."""
    text = "\n".join(data.text(record) for record in data.records("validation")).encode()
    packed = {"bz2": bz2.compress(text, 9), "xz": lzma.compress(text, preset=9)}
    return {name: 8 * len(content) / len(text) for name, content in packed.items()}
