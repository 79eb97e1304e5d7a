"""Tables that a model's config ties, in checkpoints that store the copies too.

As transformers 5 does, an output table that differs from the embedding table is kept, whatever
`tie_word_embeddings` says. Other copies must be equal.
"""

from collections.abc import Collection, Iterable
from dataclasses import replace

import numpy as np

from attnlab.errors import InputError
from attnlab.models import DecoderConfig, EncoderConfig, MaskedLMConfig, ModelConfig, Seq2SeqConfig
from attnlab.pretrained.families import Family
from attnlab.pretrained.repository import SafetensorsReader
from attnlab.pretrained.tensor_mapping import TensorMapping, TensorSlice, matches, tensor_shapes


def is_tied(config: ModelConfig) -> bool | None:
    """Return whether the output table is the embedding table; None if a model has no such table."""
    if isinstance(config, Seq2SeqConfig):
        return config.decoder.tied
    if isinstance(config, EncoderConfig):
        return config.head.tied if isinstance(config.head, MaskedLMConfig) else None
    return config.tied if isinstance(config, DecoderConfig) else None


def with_tied(config: ModelConfig, tied: bool) -> ModelConfig:
    """Return the config of the same model with a tied or a separate output table."""
    if isinstance(config, Seq2SeqConfig):
        return replace(config, decoder=replace(config.decoder, tied=tied))
    if isinstance(config, EncoderConfig) and isinstance(config.head, MaskedLMConfig):
        return replace(config, head=replace(config.head, tied=tied))
    return replace(config, tied=tied) if isinstance(config, DecoderConfig) else config


def as_stored(reader: SafetensorsReader, family: Family, config: ModelConfig) -> ModelConfig:
    """Return the config with the output table that a checkpoint has: tied or separate.

    Args:
      reader: the checkpoint's tensors.
      family: its family.
      config: the model config, from the `config.json`.
    """
    tied, names = is_tied(config), reader.shapes()
    if tied is None or family.readout is None:
        return config
    output = stored_name(family.readout.hf_name, family, names)
    if not tied:
        return with_tied(config, family.always_tied and output not in names)
    rows, param = family.for_config(config).tensors, family.readout.param
    table = _stored_table(next(row.hf_name for row in rows if row.param == param), param, family, names)
    return with_tied(config, not {table, output} <= names.keys() or _equal(reader, table, output))


def stored_name(hf_name: str, family: Family, names: Collection[str]) -> str:
    """Return the name of a tensor in a checkpoint without a head or of an older version."""
    if not any(name.startswith(family.prefix) for name in names):
        hf_name = hf_name.removeprefix(family.prefix)
    for new, old in family.renamed_prefixes:
        older = hf_name.replace(new, old)
        hf_name = older if older in names and hf_name not in names else hf_name
    return hf_name


def stored_slices(slices: Iterable[TensorSlice], family: Family, names: Collection[str]) -> list[TensorSlice]:
    """Return slices with the tensor names of a checkpoint; a copy may replace the original."""
    pieces = list(slices)
    others = {piece.hf_name for piece in pieces}
    stored = (_stored_table(piece.hf_name, piece.param, family, names, others) for piece in pieces)
    return [replace(piece, hf_name=name) for piece, name in zip(pieces, stored, strict=True)]


def _stored_table(
    hf_name: str, param: str, family: Family, names: Collection[str], others: Collection[str] = ()
) -> str:
    """Return the name of a parameter's tensor, or of the first copy that a checkpoint has.

    `others` are the tensors of other parameters.
    """
    copies = [row.hf_name for row in _copies(family) if row.param == param and row.hf_name not in others]
    stored = [stored_name(name, family, names) for name in (hf_name, *copies)]
    return next((name for name in stored if name in names), stored[0])


def check_copies(
    reader: SafetensorsReader, slices: list[TensorSlice], family: Family, where: str
) -> set[str]:
    """Check that copies of parameters equal them, and return their tensor names.

    Raises:
      InputError: a copy differs.
    """
    names, expected = reader.shapes(), tensor_shapes(slices)
    original = {piece.param: piece.hf_name for piece in slices}
    unused = set()
    for row in _copies(family):
        name = stored_name(row.hf_name, family, names)
        if name not in names or name in expected:
            continue
        unused.add(name)
        if row != family.readout and row.param in original and not matches(family.ignored, name):
            table = original[row.param]
            if table in names and not _equal(reader, table, name):
                raise InputError(
                    f"{where}: {name} differs from {table}, although the model uses one for both; "
                    "separate ones are not supported"
                )
    return unused


def _copies(family: Family) -> tuple[TensorMapping, ...]:
    return family.copies if family.readout is None else (*family.copies, family.readout)


def _equal(reader: SafetensorsReader, one: str, other: str) -> bool:
    shapes = reader.shapes()
    return shapes[one] == shapes[other] and bool(np.array_equal(reader.read(one), reader.read(other)))
