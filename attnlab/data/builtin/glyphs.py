"""Captioned pictures that need no download: the characters of the DejaVu fonts and their Unicode names."""

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
# Three families, each upright and slanted, light and bold. Bold and slanted letters without serifs are seen
# apart in training, and together only in validation.
STYLES = [
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
]
HELD_OUT_STYLE = "DejaVuSans-BoldOblique"
HELD_OUT_PERCENT, KNOWN = 10, 4


class DejavuGlyphs(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Characters in white on black on a line of writing: capitals stand taller than small letters."""

    VERSION = tfds.core.Version("{}.{}.{}".format(*matplotlib.__version_info__))  # whose fonts they are

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
                # Neither a held-out style nor a held-out name in training, and both in validation.
                if (style == HELD_OUT_STYLE) == (name in unseen) == validation and (
                    picture := draw(character, font)
                ):
                    labels = {"name": name, "character": character, "style": style}
                    yield f"{style}:{ord(character):x}", {"image": picture, **labels}


def _file(style: str) -> str:
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{style}.ttf")


def characters(style: str) -> dict[str, str]:
    """The characters of a style and their names in small letters; control characters have none."""
    every = map(chr, sorted(FT2Font(_file(style)).get_charmap()))
    return {c: unicodedata.name(c).lower() for c in every if unicodedata.name(c, "")}


def held_out(names: Iterable[str]) -> set[str]:
    """About a tenth of the names, by a hash, if their every word is in some names that are not held out."""

    def chosen(name: str) -> bool:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % 100 < HELD_OUT_PERCENT

    known = Counter(word for name in names if not chosen(name) for word in set(name.split()))
    return {name for name in names if chosen(name) and all(known[word] >= KNOWN for word in name.split())}


def draw(character: str, font: ImageFont.FreeTypeFont) -> io.BytesIO | None:
    """A PNG of a character; None if there is nothing to see, as of a space."""
    picture = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(picture).text((SIZE // 2, BASELINE), character, fill=255, font=font, anchor="ms")
    if picture.getbbox() is None:
        return None
    picture.save(file := io.BytesIO(), "PNG")
    file.seek(0)
    return file


@dataclass(frozen=True, kw_only=True)
class Glyphs(Data):
    """Characters as pictures to read, ink 1 and paper 0, and their names to tell.

    Validation has characters that training never shows, made of words that it knows, in a style of its own.
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
        encoded = {"image": tfds.decode.SkipDecoding()}  # the tokenizer learns of the names alone
        return prepared(DejavuGlyphs).as_data_source(split=split, decoders=encoded)

    def text(self, record: Any) -> str:
        """The name alone."""
        return record["name"].decode()

    def build_tokenizer(self) -> Tokenizer:
        """See `Data.build_tokenizer`; so small a set is learned from in its own order."""
        return self.tokenizer.train(self.text(record) for record in self.records("train"))

    def encode(self, record: Any, tokenizer: Tokenizer) -> Example:
        """The name, word by word, beside the picture."""
        picture = IMAGE_PROCESSOR(Image.open(io.BytesIO(record["image"])))
        return super().encode(record, tokenizer)._replace(source=picture)
