"""Folders of a checkpoint: a config, tensors in safetensors files, and a tokenizer's files."""

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import safetensors
from etils import epath
from safetensors.numpy import save_file

from attnlab.errors import InputError
from attnlab.paths import write_atomically

GENERATION = "generation_config.json"
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack")
MAX_FILE = 4 << 30  # bytes of tensors in one file


def resolve(name: str) -> epath.Path:
    """The folder of a checkpoint: as given, or fetched from the Hugging Face hub by its id.

    Raises:
      InputError: neither a folder nor an id that can be fetched.
    """
    folder = epath.Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(
            f"no checkpoint at {name}: expected a folder with {CONFIG}, or a hub id as in org/model"
        )
    import huggingface_hub  # takes a second, which only an id needs

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.spm", "*.txt"]
    try:
        return epath.Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # no network, no such repository, no permission: the library's own kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{name} is no folder here, and the hub does not give it: {reason}") from error


def read_json(file: epath.Path) -> dict[str, Any]:
    """A JSON object of a checkpoint's folder.

    Raises:
      InputError: no such file, or no JSON object in it.
    """
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(f"{file.parent} is no checkpoint: it has no {file.name}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} is no JSON object")
    return found


class Checkpoint:
    """The tensors of a folder's safetensors files, read one at a time.

    A file is opened anew for each: while it is open, all that was read of it counts as memory of the process.

    Raises:
      InputError: no safetensors, or files that cannot be read.
    """

    def __init__(self, folder: epath.Path):
        self._files: dict[str, epath.Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in _tensor_files(folder):
            try:
                with _opened(file) as opened:
                    for name in opened.keys():  # noqa: SIM118 - no dict
                        self._files[name] = file
                        self._shapes[name] = tuple(opened.get_slice(name).get_shape())
            except (OSError, safetensors.SafetensorError) as error:
                raise InputError(f"{file} cannot be read: {error}") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        return dict(self._shapes)

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor."""
        with _opened(self._files[name]) as opened:
            return opened.get_tensor(name)


def _opened(file: epath.Path) -> Any:
    return safetensors.safe_open(os.fspath(file), framework="numpy")


def _tensor_files(folder: epath.Path) -> list[epath.Path]:
    if (folder / INDEX).exists():
        names = set(read_json(folder / INDEX).get("weight_map", {}).values())
        absent = sorted(name for name in names if not (folder / name).exists())
        if absent or not names:
            raise InputError(
                f"{folder / INDEX} names files that are not there: {', '.join(absent) or 'none'}"
            )
        return [folder / name for name in sorted(names)]
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    pickles = [name for name in PICKLES if (folder / name).exists()]
    if pickles:
        raise InputError(
            f"{folder / pickles[0]}: only {SINGLE} is read, for a pickle can run any code as it is "
            "opened; convert it with transformers' save_pretrained"
        )
    raise InputError(f"{folder} has no {SINGLE} and no {INDEX}")


def write(folder: epath.Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes tensors as transformers reads them: one file, or several of at most `MAX_FILE` and an index."""
    files: list[epath.Path] = []
    total, weight_map = 0, dict[str, int]()
    for group in _groups(tensors):
        files.append(folder / f".tensors-{len(files)}.tmp")
        save_file(group, os.fspath(files[-1]), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, len(files) - 1)
        total += sum(tensor.nbytes for tensor in group.values())
    if len(files) == 1:
        files[0].replace(folder / SINGLE)
        return
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for file, name in zip(files, names, strict=True):
        file.replace(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {n: names[i] for n, i in weight_map.items()}}
    write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _groups(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """The tensors of each file."""
    group: dict[str, np.ndarray] = {}
    for name, tensor in tensors:
        if group and sum(t.nbytes for t in group.values()) + tensor.nbytes > MAX_FILE:
            yield group
            group = {}
        group[name] = tensor
    yield group
