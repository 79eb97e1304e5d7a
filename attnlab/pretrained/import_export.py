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
from attnlab.config.types import did_you_mean, short_name
from attnlab.data import Tokenizer, preprocessor
from attnlab.data.batch import batch_from_spec, batch_spec, source_kind
from attnlab.data.tokenizer import CONFIG_FILE, EOS
from attnlab.errors import InputError
from attnlab.models import (
    ContrastiveConfig,
    EncoderConfig,
    ModelConfig,
    Seq2SeqConfig,
    VisionLanguageConfig,
    ViTConfig,
)
from attnlab.models.contrastive import EndOfText
from attnlab.paths import write_atomically
from attnlab.pretrained import repository, tensor_mapping, tensors, tokenizer_files
from attnlab.pretrained.families import FAMILIES, Family
from attnlab.pretrained.hf_config import GENERATION_FIELDS, HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping


class FromScratch(NamedTuple):
    """What a model that was made here was trained with.

    Attributes:
      tokenizer: of the run.
      length: of its context, tokens.
      preprocessor: how its sources are prepared, as of `Data.preprocessor`.
    """

    tokenizer: Tokenizer
    length: int
    preprocessor: Mapping[str, Any] | None = None


Origin: TypeAlias = epath.Path | FromScratch


def read_config(folder: epath.Path) -> tuple[Family, ModelConfig]:
    """The family and the config of the model in a folder.

    Raises:
      InputError: a model_type or a setting that there is nothing here for.
    """
    fields = repository.read_json(folder / repository.CONFIG_FILE) | _read_generation_config(folder)
    model_type = fields.get("model_type")
    if model_type not in FAMILIES:
        known = f"{did_you_mean(str(model_type), FAMILIES)} There are {', '.join(sorted(FAMILIES))}"
        raise InputError(f"{folder / repository.CONFIG_FILE}: no model_type {model_type!r}{known}")
    hf_config = HFConfig(fields, str(folder / repository.CONFIG_FILE))
    try:
        config = FAMILIES[model_type].config(hf_config)
        return FAMILIES[model_type].for_config(config), config
    except InputError:
        raise
    except ValueError as error:  # of a config's own checks
        raise InputError(f"{folder / repository.CONFIG_FILE}: {error}") from error


def _read_generation_config(folder: epath.Path) -> dict[str, Any]:
    """How a model's texts are written, which newer checkpoints keep apart from their config.

    Where there is such a file, it alone has the rules; what begins a text the config may say just as well.
    """
    file = folder / repository.GENERATION_CONFIG_FILE
    if not file.exists():
        return {}
    generation = repository.read_json(file)
    start = {name: generation[name] for name in ("decoder_start_token_id",) if name in generation}
    return start | {name: generation.get(name) for name in GENERATION_FIELDS}


def read_params(folder: epath.Path, family: Family, abstract: Any) -> Any:
    """The parameters in a folder, each made where it is to lie.

    Args:
      folder: of the checkpoint.
      family: whose table of names to use.
      abstract: shapes, dtypes and shardings of the model's parameters.

    Raises:
      InputError: files that cannot be read, or tensors that do not fit the config: all of them, by name.
    """
    reader = repository.SafetensorsReader(folder)
    shapes = reader.shapes()
    mappings = [_with_checkpoint_name(mapping, family, shapes) for mapping in family.tensors]
    slices = tensor_mapping.tensor_slices(mappings, abstract)

    def is_zero(name: str) -> bool:
        return name not in shapes and tensor_mapping.matches(family.optional_zero_tensors, name)

    slices = [piece for piece in slices if not is_zero(piece.hf_name)]
    tensor_mapping.check(slices, shapes, family.ignored, str(folder))
    return tensors.load_params(reader, slices, abstract)


def _with_checkpoint_name(mapping: TensorMapping, family: Family, names: Collection[str]) -> TensorMapping:
    """Rename a tensor as a checkpoint without a head, or an older one, names it."""
    hf_name = mapping.hf_name
    if not any(name.startswith(family.prefix) for name in names):
        hf_name = hf_name.removeprefix(family.prefix)
    for new, old in family.renamed_prefixes:
        if any(old in name for name in names):
            hf_name = hf_name.replace(new, old)
    return dataclasses.replace(mapping, hf_name=hf_name)


def read_tokenizer(folder: epath.Path) -> Tokenizer | None:
    """The tokenizer in a folder, with its chat template; None where there is no file of one.

    Raises:
      InputError: files that cannot be read.
    """
    file, template = folder / "tokenizer.json", folder / "chat_template.jinja"
    settings: dict[str, Any] = {}
    source_target_tokenizers = None
    for name in ("special_tokens_map.json", CONFIG_FILE):
        settings |= repository.read_json(folder / name) if (folder / name).exists() else {}
    if template.exists():
        settings["chat_template"] = template.read_text()
    if file.exists():
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text())
        except Exception as error:  # the library raises plain Exceptions
            raise InputError(f"{file} cannot be read as a tokenizer: {error}") from error
    else:
        model_type = repository.read_json(folder / repository.CONFIG_FILE)["model_type"]
        parts = tokenizer_files.read(folder, settings, model_type)
        if parts is None:
            return None
        backend, settings, source_target_tokenizers = parts
    if "eos_token" not in settings:
        settings["eos_token"] = _eos_by_id(folder, backend)
    return Tokenizer(backend, settings, source_target_tokenizers)


def _eos_by_id(folder: epath.Path, backend: tokenizers.Tokenizer) -> str | None:
    """The token that ends a text where only the model's config tells, by its number."""
    number = repository.read_json(folder / repository.CONFIG_FILE).get("eos_token_id")
    number = number[0] if isinstance(number, list) else number
    return None if number is None else backend.id_to_token(number)


def copy_non_tensor_files(source: epath.Path, target: epath.Path) -> None:
    """Copies all of a checkpoint but its tensors: its config, and its tokenizer's and processors' files."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if (
            file.suffix in (".json", ".jinja", ".model", ".spm", ".txt")
            and file.name != repository.INDEX_FILE
        ):
            file.copy(target / file.name, overwrite=True)
    for file in source.glob(f"*_*/{repository.CONFIG_FILE}"):  # of the parts of a sentence encoder
        (target / file.parent.name).mkdir(exist_ok=True)
        file.copy(target / file.parent.name / file.name, overwrite=True)


def hf_config_fields(config: ModelConfig, length: int) -> dict[str, Any]:
    """The fields of a `config.json` that say what a model is, of the first family that can say all of it.

    Args:
      config: of the model, its `vocab_size` set.
      length: of the context, tokens.

    Raises:
      InputError: no family that has such a model.
    """
    tried: list[tuple[bool, int, str, list[str]]] = []
    for kind, family in FAMILIES.items():
        if family.fields is None or type(config) is not family.config_class:
            continue
        named = {"model_type": kind, "architectures": [family.architecture_of(config)]}
        fields = named | family.fields(config, length)
        try:
            changed = _config_differences(config, family.config(HFConfig(fields, kind)))
        except ValueError as error:  # what the family needs to be told besides, or cannot be told
            tried.append((True, 1, kind, [str(error)]))
            continue
        if not changed:
            return fields
        tried.append((False, len(changed), kind, changed))
    if not tried:
        raise InputError(
            f"no config.json can say what this model is: no model type here is a {_class_name(config)}"
        )
    *_, nearest, changed = min(tried)
    changed = [
        line for line in changed if "absent" not in line
    ]  # the fields of a part whose type is told itself
    rest = f"; and {len(changed) - 6} more" if len(changed) > 6 else ""
    raise InputError(
        f"no config.json can say what this model is; the nearest is {nearest}'s, which would need "
        f"{'; '.join(changed[:6])}{rest}"
    )


def _config_differences(before: ModelConfig, after: ModelConfig) -> list[str]:
    """Where two models differ in what they compute; a field left to its default is what it then means."""
    if type(before) is not type(after):
        return [f"model: {_class_name(before)} -> {_class_name(after)}"]
    return differences(before.canonical(), after.canonical())


def _class_name(config: ModelConfig) -> str:
    return short_name(type(config))


def write_checkpoint(folder: epath.Path, config: ModelConfig, params: Any, origin: Origin) -> None:
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
    temporary = folder.with_name(f".{folder.name}.tmp")
    if temporary.exists():
        temporary.rmtree()
    if isinstance(origin, FromScratch):
        config = _with_start_token(config, origin.tokenizer)
        ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), origin.tokenizer.eos_id)
        fields = ends | hf_config_fields(config, origin.length) | _label_names(origin.tokenizer, config)
        temporary.mkdir(parents=True)
        origin.tokenizer.with_hf_settings(_template(config)).save(temporary / "tokenizer.json")
        if origin.preprocessor is not None:
            write_atomically(
                temporary / preprocessor.CONFIG_FILE, json.dumps(origin.preprocessor, indent=2) + "\n"
            )
    else:
        _, imported = read_config(origin)
        if changed := _config_differences(imported, config):
            message = "; ".join(changed)
            raise InputError(
                f"{origin / repository.CONFIG_FILE} cannot say what was changed since: {message}"
            )
        copy_non_tensor_files(origin, temporary)
        fields = repository.read_json(temporary / repository.CONFIG_FILE)
    family = FAMILIES[fields["model_type"]].for_config(config)
    fields = family.keep_on_export(config, fields) if family.keep_on_export else fields
    fields |= {"architectures": [family.architecture_of(config)], "dtype": dtype_of(params)}
    fields.pop("torch_dtype", None)
    write_atomically(temporary / repository.CONFIG_FILE, json.dumps(fields, indent=2) + "\n")
    write_params(temporary, family, params)
    if folder.exists():
        folder.rmdir()
    temporary.rename(folder)


def _with_start_token(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """With the token written out that a model which writes of a source begins with."""
    prompts = (
        isinstance(config, VisionLanguageConfig) and config.prompt_suffix is None
    )  # which the tokenizer begins
    if (
        not isinstance(config, Seq2SeqConfig)
        or prompts
        or config.generation.decoder_start_token_id is not None
    ):
        return config
    start = dataclasses.replace(config.generation, decoder_start_token_id=tokenizer.bos_tokens[-1])
    return dataclasses.replace(config, generation=start)


def _label_names(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """The names of a model's classes of images, which are the words of its tokenizer."""
    if not isinstance(config, ViTConfig) or config.classes != tokenizer.vocab_size:
        return {}
    names = {i: tokenizer.token_text(i) for i in range(tokenizer.vocab_size)}
    return {"id2label": names, "label2id": {name: i for i, name in names.items()}}


def _template(config: ModelConfig) -> str:
    """What stands around a text A that a model made here reads: for encoders nothing, else its end."""
    if isinstance(config, EncoderConfig):
        return "$A"
    pooling = config.text.pooling if isinstance(config, ContrastiveConfig) else None
    ended = isinstance(pooling, EndOfText) or source_kind(config.source_shape) == "text"
    return f"$A {EOS}" if ended else f"{EOS} $A"


def dtype_of(params: Any) -> str:
    """The number format of the parameters."""
    return jax.tree.leaves(params)[0].dtype.name


def write_params(folder: epath.Path, family: Family, params: Any) -> None:
    """Writes parameters under the names and in the layouts of a family."""
    repository.write_safetensors(
        folder, tensors.to_tensors(tensor_mapping.tensor_slices(family.tensors, params), params)
    )


def abstract_params(config: ModelConfig, mesh: Mesh | None = None) -> Any:
    """Shapes, dtypes and shardings of a checkpoint's parameters on a mesh, or on one device without one."""

    def laid_out(x):
        alone = SingleDeviceSharding(jax.local_devices()[0])
        where = alone if mesh is None else sharding.named_sharding(mesh, x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    rows = 1 if mesh is None else mesh.size
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        inputs = batch_from_spec(batch_spec(rows, 1, config.source_shape), sharding.batch_zeros).inputs
        model = config.build(1)
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]
    return jax.tree.map(laid_out, shapes)
