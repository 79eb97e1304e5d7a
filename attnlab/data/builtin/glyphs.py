"""Captioned images without a download: characters of the DejaVu fonts and their Unicode names."""

import hashlib
import io
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import tensorflow_datasets as tfds
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from attnlab.data.base import Data
from attnlab.data.batch import Example
from attnlab.data.images import ImageProcessor
from attnlab.data.prepare import prepared
from attnlab.data.tokenizer import BPE, Bytes, Tokenizer, Words

SIZE, FONT_SIZE, BASELINE = 32, 22, 24  # pixels; all but a dozen characters fit
LONGEST = 11  # words of a name
IMAGE_PROCESSOR = ImageProcessor(rgb=False, size=(SIZE, SIZE), mean=(0.0,), std=(1.0,))
# Three families, each upright and slanted, light and bold. Training has bold and slanted sans-serif
# letters only separately; their combination is only in validation.
STYLES = [
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
]
HELD_OUT_STYLE = "DejaVuSans-BoldOblique"
HELD_OUT_PERCENT, KNOWN = 10, 4


class DejavuGlyphs(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Characters in white on black, aligned to a baseline."""

    VERSION = tfds.core.Version("{}.{}.{}".format(*matplotlib.__version_info__))  # it ships the fonts

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(SIZE, SIZE, 1), encoding_format="png"),
            "name": tfds.features.Text(),
            "character": tfds.features.Text(),
            "style": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            description="Glyphs of the DejaVu fonts with the names of their characters.",
            homepage="https://dejavu-fonts.github.io",
            license="Bitstream Vera and Arev fonts: free to use, with their notice",
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split: str):
        styles = {style: characters(style) for style in STYLES}
        names = {name for named in styles.values() for name in named.values()}
        unseen, validation = held_out(names), split == "validation"
        for style, named in styles.items():
            font = ImageFont.truetype(_file(style), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
            for character, name in named.items():
                # Training has neither the held-out style nor held-out names; validation has both.
                if (style == HELD_OUT_STYLE) == (name in unseen) == validation and (
                    image := draw(character, font)
                ):
                    labels = {"name": name, "character": character, "style": style}
                    yield f"{style}:{ord(character):x}", {"image": image, **labels}


def _file(style: str) -> str:
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{style}.ttf")


def characters(style: str) -> dict[str, str]:
    """Return the characters of a style with lower-case names, without control characters."""
    every = map(chr, sorted(FT2Font(_file(style)).get_charmap()))
    return {c: unicodedata.name(c).lower() for c in every if unicodedata.name(c, "")}


def held_out(names: Iterable[str]) -> set[str]:
    """Return about a tenth of the names, selected by a hash.

    Each of their words occurs in at least `KNOWN` names that are not held out.
    """

    def chosen(name: str) -> bool:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % 100 < HELD_OUT_PERCENT

    known = Counter(word for name in names if not chosen(name) for word in set(name.split()))
    return {name for name in names if chosen(name) and all(known[word] >= KNOWN for word in name.split())}


def draw(character: str, font: ImageFont.FreeTypeFont) -> io.BytesIO | None:
    """Return a PNG of a character, or None if it is blank, such as a space."""
    image = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(image).text((SIZE // 2, BASELINE), character, fill=255, font=font, anchor="ms")
    if image.getbbox() is None:
        return None
    image.save(file := io.BytesIO(), "PNG")
    file.seek(0)
    return file


@dataclass(frozen=True, kw_only=True)
class Glyphs(Data):
    """Images of characters, ink 1 and paper 0, with their names as targets.

    Validation has characters that are not in training, named by training words, in its own style.
    """

    tokenizer: Bytes | BPE | Words = Words()  # noqa: RUF009 - frozen, so safe to share
    sequence_length: int = LONGEST + 1

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Height, width and channels."""
        return SIZE, SIZE, 1

    @property
    def preprocessor(self) -> dict[str, Any]:
        """See `Data.preprocessor`."""
        return IMAGE_PROCESSOR.settings()

    def records(self, split: str) -> Sequence[Any]:
        """Records with "image", "name", "character" and "style" as bytes, prepared on first use."""
        encoded = {"image": tfds.decode.SkipDecoding()}  # training the tokenizer needs no images
        return prepared(DejavuGlyphs).as_data_source(split=split, decoders=encoded)

    def text(self, record: Any) -> str:
        """Return the name."""
        return record["name"].decode()

    def build_tokenizer(self) -> Tokenizer:
        """Train the tokenizer on all names in their order; the set is small."""
        return self.tokenizer.train(self.text(record) for record in self.records("train"))

    def encode(self, record: Any, tokenizer: Tokenizer) -> Example:
        """Return the tokens of the name with the image as source."""
        image = IMAGE_PROCESSOR(Image.open(io.BytesIO(record["image"])))
        return super().encode(record, tokenizer)._replace(source=image)
