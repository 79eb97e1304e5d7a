"""Sentences as vectors: encoders in the layout of sentence-transformers (Sentence-BERT, arXiv 1908.10084)."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from attnlab import pretrained, sharding
from attnlab.data import Tokenizer
from attnlab.errors import InputError
from attnlab.layers import Dtypes
from attnlab.models import EncoderConfig, FirstToken, Learned, MeanOfTokens
from attnlab.models.heads import pool
from attnlab.pretrained import repository
from attnlab.pretrained.hf_config import HFConfig

POOLINGS: dict[str, FirstToken | MeanOfTokens] = {
    "pooling_mode_cls_token": FirstToken(),
    "pooling_mode_mean_tokens": MeanOfTokens(),
}


@dataclass(frozen=True)
class SentenceEncoder:
    """Texts in, a vector of each out.

    Attributes:
      model: an encoder.
      params: its parameters.
      tokenizer: of its texts.
      pooling: which tokens' activations a vector is the mean of.
      normalize: whether vectors are of length 1, so that their products are cosines.
      length: tokens that are read of a text; the rest is cut off.
      mesh: where the parameters are; None is one device, and no mesh.
    """

    model: nn.Module
    params: Any
    tokenizer: Tokenizer
    pooling: FirstToken | MeanOfTokens
    normalize: bool
    length: int
    mesh: Mesh | None = None

    def __call__(self, texts: Sequence[str], batch_size: int = 32) -> Float[np.ndarray, "N E"]:
        """The vectors, float32, so many texts of like length at a time."""
        documents = [self.tokenizer.encode_document(text, self.length) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: len(documents[i]))
        batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        vectors = [self._vectors([documents[i] for i in batch]) for batch in batches]
        if not vectors:
            return np.zeros((0, self.model.config.width), np.float32)
        return np.concatenate(vectors)[np.argsort(order)]

    def _vectors(self, documents: Sequence[Sequence[int]]) -> Float[np.ndarray, "N E"]:
        # Lengths in steps and rows in powers of two, so that few programs are compiled.
        length = min(-(-max(map(len, documents)) // 16) * 16, self.length)
        pieces = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        count = -(-(1 << (len(documents) - 1).bit_length()) // pieces) * pieces
        tokens, segments = np.zeros((2, count, length), np.int32)
        for i, document in enumerate(documents):
            tokens[i, : len(document)], segments[i, : len(document)] = document, 1
        put: Any = jnp.asarray
        if self.mesh is not None:
            put = partial(
                jax.device_put, device=sharding.named_sharding(self.mesh, P(("data", "fsdp"), None))
            )
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            how = (self.model, self.pooling, self.normalize)
            return np.asarray(_pooled(*how, self.params, put(tokens), put(segments)))[: len(documents)]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _pooled(model, pooling, normalize: bool, params, tokens, segments) -> Float[Array, "B E"]:
    x = model.apply({"params": params}, tokens, segments, method="hidden")
    vectors = pool(x.astype(jnp.float32), segments, pooling)[:, 0]
    if not normalize:
        return vectors
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def load(name: str, mesh: Mesh | None = None, dtypes: Dtypes = Dtypes()) -> SentenceEncoder:  # noqa: B008
    """A sentence encoder, with what its folder says of pooling, lengths and norms.

    Args:
      name: a folder, or an id of the Hugging Face hub.
      mesh: where to put the parameters; None is one device, and no mesh.
      dtypes: number formats of parameters and computation.

    Raises:
      InputError: no sentence encoder, a part of one that there is nothing here for, or what `pretrained.load`
        refuses.
    """
    folder = repository.resolve(name)
    pooling, normalize = _parts(folder)
    checkpoint = pretrained.load(str(folder), mesh, dtypes)
    if not isinstance(checkpoint.config, EncoderConfig) or checkpoint.tokenizer is None:
        raise InputError(f"{folder} has no encoder of texts, or no tokenizer")
    limit = _hf_config(folder / "sentence_bert_config.json")
    limit.require("do_lower_case", False)
    _hf_config(folder / "config_sentence_transformers.json").require("default_prompt_name", None)
    length, positions = limit.get("max_seq_length"), checkpoint.config.positions
    if isinstance(positions, Learned):
        length = min(length or positions.length, positions.length - positions.offset)
    if length is None:
        raise InputError(f"{folder}: nothing says how long texts may be")
    return SentenceEncoder(
        checkpoint.model, checkpoint.params, checkpoint.tokenizer, pooling, normalize, length, mesh
    )


def _parts(folder: epath.Path) -> tuple[FirstToken | MeanOfTokens, bool]:
    """How vectors are pooled, and whether they are normalised."""
    file = folder / "modules.json"
    if not file.exists():
        raise InputError(f"{folder} is no sentence encoder: it has no {file.name}")
    parts = json.loads(file.read_text())
    kinds = [part["type"].rpartition(".")[2] for part in parts]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or parts[0]["path"]:
        names = ", ".join(kinds)
        raise InputError(
            f"{file}: parts {names} are not supported; there are Transformer, Pooling, Normalize"
        )
    file = folder / parts[1]["path"] / repository.CONFIG_FILE
    chosen = [
        name for name, on in repository.read_json(file).items() if name.startswith("pooling_mode") and on
    ]
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        names = " and ".join(chosen) or "none"
        raise InputError(f"{file}: pooling by {names} is not supported; it may be {' or '.join(POOLINGS)}")
    return POOLINGS[chosen[0]], kinds[-1] == "Normalize"


def _hf_config(file: epath.Path) -> HFConfig:
    return HFConfig(repository.read_json(file) if file.exists() else {}, str(file))
