"""Files of a checkpoint folder: JSON configs and safetensors, local or from the hub."""

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import safetensors
from etils import epath
from safetensors.numpy import save_file

from attnlab import untrusted
from attnlab.errors import InputError
from attnlab.paths import write_atomically

GENERATION_CONFIG_FILE = "generation_config.json"
CONFIG_FILE, SAFETENSORS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack")
WEIGHT_DTYPES = ("BF16", "F16", "F32", "F64")
EXPECTED_INDEX = {"weight_map": untrusted.mapping_of(untrusted.string())}
MAX_SHARD_BYTES = 4 << 30  # bytes of tensors in one file


def resolve(name: str) -> epath.Path:
    """Return a checkpoint's folder, downloading it from the Hugging Face hub if `name` is a hub id.

    Raises:
      InputError: `name` is neither a folder nor a hub id that can be downloaded.
    """
    folder = epath.Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(
            f"no checkpoint at {name}: expected a folder with {CONFIG_FILE}, or a hub id such as org/model"
        )
    import huggingface_hub  # imported late: it takes a second, and folders do not need it

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.spm", "*.txt"]
    try:
        return epath.Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the library raises many types: no network, repository or permission
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"{name} is not a local folder and cannot be downloaded from the hub: {reason}"
        ) from error


def read_json(file: epath.Path) -> dict[str, Any]:
    """Read a JSON object from a file of a checkpoint folder.

    Raises:
      InputError: the file does not exist or does not contain a JSON object.
    """
    if not file.exists():
        raise InputError(f"{file.parent} is not a checkpoint: it has no {file.name}")
    return untrusted.read_object(file)


def has_tensors(folder: epath.Path) -> bool:
    """Return whether a folder has safetensors files."""
    return any((folder / name).exists() for name in (INDEX_FILE, SAFETENSORS_FILE))


class SafetensorsReader:
    """A reader of a folder's safetensors files, one tensor at a time.

    Each read opens and closes the file, because the pages of an open memory-mapped file count as
    memory of the process.

    Raises:
      InputError: the folder has no safetensors, or files that cannot be read.
    """

    def __init__(self, folder: epath.Path):
        self._files: dict[str, epath.Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for file in _tensor_files(folder):
            untrusted.check_regular(file)
            try:
                with _open(file) as opened:
                    for name in opened.keys():  # noqa: SIM118 - not a dict
                        self._files[name] = file
                        self._shapes[name] = tuple(opened.get_slice(name).get_shape())
                        self._dtypes[name] = opened.get_slice(name).get_dtype()
            except (OSError, safetensors.SafetensorError) as error:
                raise InputError(f"{file} cannot be read: {error}") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name."""
        return dict(self._shapes)

    def read(self, name: str) -> np.ndarray:
        """Read a tensor of weights.

        Raises:
          InputError: it has no floating-point dtype, or only NaN.
        """
        if (dtype := self._dtypes[name]) not in WEIGHT_DTYPES:
            quantized = "; quantised checkpoints are not supported" if dtype.startswith("F") else ""
            raise InputError(
                f"{self._files[name]}: {name} has dtype {dtype}; weights must have "
                f"{', '.join(WEIGHT_DTYPES)}{quantized}"
            )
        with _open(self._files[name]) as opened:
            tensor = opened.get_tensor(name)
        if np.isnan(tensor.reshape(-1)[:1]).any() and np.isnan(tensor).all():
            raise InputError(f"{self._files[name]}: all elements of {name} are NaN")
        return tensor


def _open(file: epath.Path) -> Any:
    return safetensors.safe_open(os.fspath(file), framework="numpy")


def _tensor_files(folder: epath.Path) -> list[epath.Path]:
    if (folder / INDEX_FILE).exists():
        index = untrusted.Fields(read_json(folder / INDEX_FILE), str(folder / INDEX_FILE), EXPECTED_INDEX)
        names = sorted(set(index["weight_map"].values()))
        files = [untrusted.inside(folder, name) for name in names]
        absent = [file.name for file in files if not file.exists()]
        if absent or not names:
            raise InputError(
                f"{folder / INDEX_FILE} names missing files: {', '.join(absent) or 'no files at all'}"
            )
        return files
    if (folder / SAFETENSORS_FILE).exists():
        return [folder / SAFETENSORS_FILE]
    pickles = [name for name in PICKLE_FILES if (folder / name).exists()]
    if pickles:
        raise InputError(
            f"{folder / pickles[0]}: only {SAFETENSORS_FILE} is read, because loading a pickle can "
            "run arbitrary code; convert it with transformers' save_pretrained"
        )
    raise InputError(f"{folder} has no {SAFETENSORS_FILE} and no {INDEX_FILE}")


def write_safetensors(folder: epath.Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write tensors as one safetensors file, or as shards of `MAX_SHARD_BYTES` with an index."""
    files: list[epath.Path] = []
    total, weight_map = 0, dict[str, int]()
    for shard in _shards(tensors):
        files.append(folder / f".tensors-{len(files)}.tmp")
        save_file(shard, os.fspath(files[-1]), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, len(files) - 1)
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(files) == 1:
        files[0].replace(folder / SAFETENSORS_FILE)
        return
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for file, name in zip(files, names, strict=True):
        file.replace(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {n: names[i] for n, i in weight_map.items()}}
    write_atomically(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def _shards(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """Yield the tensors of each file."""
    shard: dict[str, np.ndarray] = {}
    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > MAX_SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard
