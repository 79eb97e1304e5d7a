"""`Text`: a language-modelling data set chosen by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from attnlab.data.base import Data
from attnlab.errors import InputError
from attnlab.paths import absolute

FORMS = "stdlib_docs, stdlib_code, tfds:NAME[/CONFIG][#FEATURE], text:GLOB"


@dataclass(frozen=True, kw_only=True)
class Text(Data):
    """Plain text for next-token prediction.

    Raises:
      InputError: the name has none of the known forms.
    """

    name: str = "stdlib_docs"
    """"stdlib_docs", "stdlib_code", "tfds:NAME[/CONFIG][#FEATURE]" or "text:GLOB" (becomes absolute)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kind, colon, rest = self.name.partition(":")
        known = rest if colon and kind in ("tfds", "text") else self.name in ("stdlib_docs", "stdlib_code")
        if not known:
            raise InputError(f"data.name {self.name!r} is unknown; it is one of {FORMS}")
        if kind == "text":
            # The run's config is saved with the absolute path, so that it works from other folders.
            object.__setattr__(self, "name", f"text:{absolute(rest)}")

    def records(self, split: str) -> Sequence[Any]:
        """Return records with a "text" each, read lazily."""
        # Imported here, because importing TFDS takes a second that other data sets do not need.
        kind, _, rest = self.name.partition(":")
        if kind == "tfds":
            from attnlab.data import tfds_text

            return tfds_text.records(rest, split)
        if kind == "text":
            from attnlab.data import text_files

            return text_files.records(rest, split)
        from attnlab.data.builtin import stdlib

        return stdlib.records(self.name, split)

    def files(self) -> Mapping[str, epath.PathLike]:
        """Return the text files or the prepared files; none for the standard library."""
        kind, _, rest = self.name.partition(":")
        if kind == "tfds":
            from attnlab.data import tfds_text

            return tfds_text.files(rest)
        if kind == "text":
            from attnlab.data import text_files

            return text_files.files(rest)
        return {}
