"""A checkpoint of the Hugging Face layout as a model here, and a model here as such a checkpoint."""

import contextlib
import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import tokenizers
from etils import epath
from jax.sharding import Mesh, SingleDeviceSharding

from attnlab import sharding
from attnlab.config import differences
from attnlab.config.types import did_you_mean
from attnlab.data import Tokenizer, preprocessor
from attnlab.data.batch import of_spec, spec
from attnlab.data.tokenizer import EOS, SETTINGS
from attnlab.errors import InputError
from attnlab.models import (
    ContrastiveConfig,
    EncoderConfig,
    ModelConfig,
    PrefixConfig,
    Seq2SeqConfig,
    ViTConfig,
)
from attnlab.models.contrastive import EndOfText
from attnlab.paths import write_atomically
from attnlab.pretrained import repository, table, tensors, vocabularies
from attnlab.pretrained.families import FAMILIES, Family
from attnlab.pretrained.hf_config import RULES, Settings


class Made(NamedTuple):
    """What a model that was made here was trained with.

    Attributes:
      tokenizer: of the run.
      length: of its context, tokens.
      preprocessor: how its sources are prepared, as of `Data.preprocessor`.
    """

    tokenizer: Tokenizer
    length: int
    preprocessor: Mapping[str, Any] | None = None


Origin: TypeAlias = epath.Path | Made


def read_config(folder: epath.Path) -> tuple[Family, ModelConfig]:
    """The family and the config of the model in a folder.

    Raises:
      InputError: a model_type or a setting that there is nothing here for.
    """
    fields = repository.read_json(folder / repository.CONFIG) | _generation(folder)
    kind = fields.get("model_type")
    if kind not in FAMILIES:
        known = f"{did_you_mean(str(kind), FAMILIES)} There are {', '.join(sorted(FAMILIES))}"
        raise InputError(f"{folder / repository.CONFIG}: no model_type {kind!r}{known}")
    settings = Settings(fields, str(folder / repository.CONFIG))
    try:
        config = FAMILIES[kind].config(settings)
        return FAMILIES[kind].of(config), config
    except InputError:
        raise
    except ValueError as error:  # of a config's own checks
        raise InputError(f"{folder / repository.CONFIG}: {error}") from error


def _generation(folder: epath.Path) -> dict[str, Any]:
    """How a model's texts are written, which newer checkpoints keep apart from their config.

    Where there is such a file, it alone has the rules; what begins a text the config may say just as well.
    """
    file = folder / repository.GENERATION
    if not file.exists():
        return {}
    found = repository.read_json(file)
    begin = {name: found[name] for name in ("decoder_start_token_id",) if name in found}
    return begin | {name: found.get(name) for name in RULES}


def read_params(folder: epath.Path, family: Family, abstract: Any) -> Any:
    """The parameters in a folder, each made where it is to lie.

    Args:
      folder: of the checkpoint.
      family: whose table of names to use.
      abstract: shapes, dtypes and shardings of the model's parameters.

    Raises:
      InputError: files that cannot be read, or tensors that do not fit the config: all of them, by name.
    """
    checkpoint = repository.Checkpoint(folder)
    there = checkpoint.shapes()
    found = table.places([_as_named(row, family, there) for row in family.tensors], abstract)
    zeros = [n for p in found if (n := p.theirs) not in there and table.matches(family.zeros, n)]
    found = [place for place in found if place.theirs not in zeros]
    table.check(found, there, family.ignored, str(folder))
    return tensors.load(checkpoint, found, abstract)


def _as_named(row: table.Tensor, family: Family, there: Collection[str]) -> table.Tensor:
    """A row by the names of a checkpoint: of a model without its head, or an older one."""
    theirs = row.theirs
    if not any(name.startswith(family.prefix) for name in there):
        theirs = theirs.removeprefix(family.prefix)
    for now, before in family.older:
        if any(before in name for name in there):
            theirs = theirs.replace(now, before)
    return dataclasses.replace(row, theirs=theirs)


def read_tokenizer(folder: epath.Path) -> Tokenizer | None:
    """The tokenizer in a folder, with its chat template; None where there is no file of one.

    Raises:
      InputError: files that cannot be read.
    """
    file, template = folder / "tokenizer.json", folder / "chat_template.jinja"
    settings: dict[str, Any] = {}
    cuts = None
    for name in ("special_tokens_map.json", SETTINGS):
        settings |= repository.read_json(folder / name) if (folder / name).exists() else {}
    if template.exists():
        settings["chat_template"] = template.read_text()
    if file.exists():
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text())
        except Exception as error:  # the library raises plain Exceptions
            raise InputError(f"{file} cannot be read as a tokenizer: {error}") from error
    else:
        made = vocabularies.read(
            folder, settings, repository.read_json(folder / repository.CONFIG)["model_type"]
        )
        if made is None:
            return None
        backend, settings, cuts = made
    if "eos_token" not in settings:
        settings["eos_token"] = _eos_by_id(folder, backend)
    return Tokenizer(backend, settings, cuts)


def _eos_by_id(folder: epath.Path, backend: tokenizers.Tokenizer) -> str | None:
    """The token that ends a text where only the model's config tells, by its number."""
    number = repository.read_json(folder / repository.CONFIG).get("eos_token_id")
    number = number[0] if isinstance(number, list) else number
    return None if number is None else backend.id_to_token(number)


def copy_small_files(source: epath.Path, target: epath.Path) -> None:
    """Copies all of a checkpoint but its tensors: its config, and its tokenizer's and processors' files."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".spm", ".txt") and file.name != repository.INDEX:
            file.copy(target / file.name, overwrite=True)
    for file in source.glob(f"*_*/{repository.CONFIG}"):  # of the parts of a sentence encoder
        (target / file.parent.name).mkdir(exist_ok=True)
        file.copy(target / file.parent.name / file.name, overwrite=True)


def describe(config: ModelConfig, length: int) -> dict[str, Any]:
    """The fields of a `config.json` that say what a model is, of the first family that can say all of it.

    Args:
      config: of the model, its `vocab_size` set.
      length: of the context, tokens.

    Raises:
      InputError: no family that has such a model.
    """
    tried: list[tuple[bool, int, str, list[str]]] = []
    for kind, family in FAMILIES.items():
        if family.fields is None or type(config) is not family.made:
            continue
        named = {"model_type": kind, "architectures": [family.architecture_of(config)]}
        fields = named | family.fields(config, length)
        try:
            told = _differences(config, family.config(Settings(fields, kind)))
        except ValueError as error:  # what the family needs to be told besides, or cannot be told
            tried.append((True, 1, kind, [str(error)]))
            continue
        if not told:
            return fields
        tried.append((False, len(told), kind, told))
    if not tried:
        raise InputError(
            f"no config.json can say what this model is: no model type here is a {_name(config)}"
        )
    *_, nearest, told = min(tried)
    told = [line for line in told if "absent" not in line]  # the fields of a part whose type is told itself
    more = f"; and {len(told) - 6} more" if len(told) > 6 else ""
    raise InputError(
        f"no config.json can say what this model is; the nearest is {nearest}'s, which would need "
        f"{'; '.join(told[:6])}{more}"
    )


def _differences(before: ModelConfig, after: ModelConfig) -> list[str]:
    """Where two models differ in what they compute; a field left to its default is what it then means."""
    if type(before) is not type(after):
        return [f"model: {_name(before)} -> {_name(after)}"]
    return differences(before.written_out(), after.written_out())


def _name(config: ModelConfig) -> str:
    return type(config).__name__


def write(folder: epath.Path, config: ModelConfig, params: Any, origin: Origin) -> None:
    """Writes a model as a checkpoint, whole or not at all.

    Args:
      folder: to make.
      config: of the model, its `vocab_size` set.
      params: its parameters.
      origin: the folder with the small files of the checkpoint that it began as; or what a model that
        was made here was trained with.

    Raises:
      InputError: a folder with something in it, or a model that the checkpoint's config cannot describe.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty")
    making = folder.with_name(f".{folder.name}.tmp")
    if making.exists():
        making.rmtree()
    if isinstance(origin, Made):
        config = _started(config, origin.tokenizer)
        ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), origin.tokenizer.eos_id)
        fields = ends | describe(config, origin.length) | _classes(origin.tokenizer, config)
        making.mkdir(parents=True)
        origin.tokenizer.for_others(_around(config)).save(making / "tokenizer.json")
        if origin.preprocessor is not None:
            write_atomically(making / preprocessor.FILE, json.dumps(origin.preprocessor, indent=2) + "\n")
    else:
        _, theirs = read_config(origin)
        if changed := _differences(theirs, config):
            told = "; ".join(changed)
            raise InputError(f"{origin / repository.CONFIG} cannot say what was changed since: {told}")
        copy_small_files(origin, making)
        fields = repository.read_json(making / repository.CONFIG)
    family = FAMILIES[fields["model_type"]].of(config)
    fields = family.kept(config, fields) if family.kept else fields
    fields |= {"architectures": [family.architecture_of(config)], "dtype": dtype_of(params)}
    fields.pop("torch_dtype", None)
    write_atomically(making / repository.CONFIG, json.dumps(fields, indent=2) + "\n")
    write_params(making, family, params)
    if folder.exists():
        folder.rmdir()
    making.rename(folder)


def _started(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """With the token written out that a model which writes of a source begins with."""
    prompts = isinstance(config, PrefixConfig) and config.separator is None  # which the tokenizer begins
    if not isinstance(config, Seq2SeqConfig) or prompts or config.start is not None:
        return config
    return dataclasses.replace(config, start=tokenizer.start[-1])


def _classes(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """The names of a model's classes of images, which are the words of its tokenizer."""
    if not isinstance(config, ViTConfig) or config.classes != tokenizer.vocab_size:
        return {}
    names = {i: tokenizer.token_text(i) for i in range(tokenizer.vocab_size)}
    return {"id2label": names, "label2id": {name: i for i, name in names.items()}}


def _around(config: ModelConfig) -> str:
    """What stands around a text A that a model made here reads: for encoders nothing, else its end."""
    if isinstance(config, EncoderConfig):
        return "$A"
    pooling = config.text.pooling if isinstance(config, ContrastiveConfig) else None
    ended = isinstance(pooling, EndOfText) or len(config.source_shape or ()) == 1
    return f"$A {EOS}" if ended else f"{EOS} $A"


def dtype_of(params: Any) -> str:
    """The number format of the parameters."""
    return jax.tree.leaves(params)[0].dtype.name


def write_params(folder: epath.Path, family: Family, params: Any) -> None:
    """Writes parameters under the names and in the layouts of a family."""
    repository.write(folder, tensors.save(table.places(family.tensors, params), params))


def abstract_params(config: ModelConfig, mesh: Mesh | None = None) -> Any:
    """Shapes, dtypes and shardings of a checkpoint's parameters on a mesh, or on one device without one."""

    def laid_out(x):
        alone = SingleDeviceSharding(jax.local_devices()[0])
        where = alone if mesh is None else sharding.named(mesh, x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    rows = 1 if mesh is None else mesh.size
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        inputs = of_spec(spec(rows, 1, config.source_shape), sharding.zero_rows).inputs
        model = config.build(1)
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]
    return jax.tree.map(laid_out, shapes)
