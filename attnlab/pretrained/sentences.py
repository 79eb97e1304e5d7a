"""Sentence embeddings from sentence-transformers folders (Sentence-BERT, arXiv 1908.10084)."""

import contextlib
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

from attnlab import pretrained, sharding, untrusted
from attnlab.data import Tokenizer
from attnlab.distributed.collectives import to_host
from attnlab.errors import InputError
from attnlab.layers import Dtypes
from attnlab.layers.linear import check_ids
from attnlab.models import EncoderConfig, FirstToken, Learned, MeanOfTokens
from attnlab.models.heads import pool
from attnlab.pretrained import repository
from attnlab.pretrained.hf_config import HFConfig

MODULES = untrusted.list_of(
    untrusted.Expected(
        'an object with strings "type" and "path"',
        lambda x: isinstance(x, dict) and all(isinstance(x.get(key), str) for key in ("type", "path")),
    ),
    1,
    10,
)
POOLINGS: dict[str, FirstToken | MeanOfTokens] = {
    "pooling_mode_cls_token": FirstToken(),
    "pooling_mode_mean_tokens": MeanOfTokens(),
}


@dataclass(frozen=True)
class SentenceEncoder:
    """A sentence encoder: a callable from texts to embeddings.

    Attributes:
      model: the encoder module.
      params: the parameters of `model`.
      tokenizer: the tokenizer.
      pooling: the tokens whose activations are averaged.
      normalize: whether embeddings have length 1, so that dot products are cosines.
      length: the maximum number of tokens; longer texts are truncated.
      mesh: the mesh of the parameters, or None for one device.
    """

    model: nn.Module
    params: Any
    tokenizer: Tokenizer
    pooling: FirstToken | MeanOfTokens
    normalize: bool
    length: int
    mesh: Mesh | None = None

    def __call__(self, texts: Sequence[str], batch_size: int = 32) -> Float[np.ndarray, "N E"]:
        """Return float32 embeddings, computed in batches of texts of similar length."""
        documents = [self.tokenizer.encode_document(text, self.length) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: len(documents[i]))
        batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        vectors = [self._vectors([documents[i] for i in batch]) for batch in batches]
        if not vectors:
            return np.zeros((0, self.model.config.width), np.float32)
        return np.concatenate(vectors)[np.argsort(order)]

    def _vectors(self, documents: Sequence[Sequence[int]]) -> Float[np.ndarray, "N E"]:
        # Round lengths up to multiples of 16 and rows to powers of two, to compile few programs.
        length = min(-(-max(map(len, documents)) // 16) * 16, self.length)
        shards = 1 if self.mesh is None else sharding.num_batch_shards(self.mesh)
        count = -(-(1 << (len(documents) - 1).bit_length()) // shards) * shards
        tokens, segments = np.zeros((2, count, length), np.int32)
        for i, document in enumerate(documents):
            tokens[i, : len(document)], segments[i, : len(document)] = document, 1
        check_ids(tokens, self.model.config.vocab_size)
        put: Any = jnp.asarray
        if self.mesh is not None:
            put = partial(
                jax.device_put, device=sharding.named_sharding(self.mesh, P(sharding.BATCH_AXES, None))
            )
        with contextlib.nullcontext() if self.mesh is None else sharding.set_mesh_of_rows(self.mesh):
            static = (self.model, self.pooling, self.normalize)
            return to_host(_pooled(*static, self.params, put(tokens), put(segments)))[: len(documents)]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _pooled(model, pooling, normalize: bool, params, tokens, segments) -> Float[Array, "B E"]:
    x = model.apply({"params": params}, tokens, segments, method="hidden")
    vectors = pool(x.astype(jnp.float32), segments, pooling)[:, 0]
    if not normalize:
        return vectors
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def load(name: str, mesh: Mesh | None = None, dtypes: Dtypes = Dtypes()) -> SentenceEncoder:  # noqa: B008
    """Load a sentence encoder with the pooling, length and normalization of its folder.

    Args:
      name: a folder, or a Hugging Face hub id.
      mesh: shards the parameters over this mesh; None puts them on one device.
      dtypes: dtypes of parameters and computation.

    Raises:
      InputError: the folder is not a sentence encoder, one of its modules is not supported, or
        `pretrained.load` fails.
    """
    folder = repository.resolve(name)
    pooling, normalize = _parts(folder)
    checkpoint = pretrained.load(str(folder), mesh, dtypes)
    if not isinstance(checkpoint.config, EncoderConfig) or checkpoint.tokenizer is None:
        raise InputError(f"{folder} is not a text encoder with a tokenizer")
    limit = _hf_config(folder / "sentence_bert_config.json")
    limit.require("do_lower_case", False)
    _hf_config(folder / "config_sentence_transformers.json").require("default_prompt_name", None)
    length, positions = limit.get("max_seq_length"), checkpoint.config.positions
    if isinstance(positions, Learned):
        length = min(length or positions.length, positions.length - positions.offset)
    if length is None:
        raise InputError(f"{folder}: max_seq_length is missing, and the positions set no maximum text length")
    return SentenceEncoder(
        checkpoint.model, checkpoint.params, checkpoint.tokenizer, pooling, normalize, length, mesh
    )


def _parts(folder: epath.Path) -> tuple[FirstToken | MeanOfTokens, bool]:
    """Return the pooling, and whether embeddings are normalized."""
    file = folder / "modules.json"
    if not file.exists():
        raise InputError(f"{folder} is not a sentence encoder: it has no {file.name}")
    parts = untrusted.check(str(file), untrusted.read_json(file), MODULES)
    types = [part["type"].rpartition(".")[2] for part in parts]
    if types not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or parts[0]["path"]:
        names = ", ".join(types)
        raise InputError(
            f"{file}: modules {names} are not supported; supported: Transformer, Pooling, Normalize"
        )
    file = untrusted.inside(folder, parts[1]["path"]) / repository.CONFIG_FILE
    chosen = [
        name for name, on in repository.read_json(file).items() if name.startswith("pooling_mode") and on
    ]
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        names = " and ".join(chosen) or "none"
        raise InputError(f"{file}: pooling by {names} is not supported; it may be {' or '.join(POOLINGS)}")
    return POOLINGS[chosen[0]], types[-1] == "Normalize"


def _hf_config(file: epath.Path) -> HFConfig:
    return HFConfig(repository.read_json(file) if file.exists() else {}, str(file))
