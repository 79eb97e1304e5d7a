"""Conversion between Hugging Face checkpoints and this library's models."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import tokenizers
from etils import epath
from jax.sharding import Mesh, SingleDeviceSharding

from attnlab import sharding, untrusted
from attnlab.config import differences
from attnlab.config.types import did_you_mean, short_name
from attnlab.data import Tokenizer, preprocessor
from attnlab.data.batch import batch_from_spec, batch_spec, source_kind
from attnlab.data.tokenizer import EOS
from attnlab.data.tokenizer_files import CONFIG_FILE, check_settings, read_backend
from attnlab.errors import InputError, shorten
from attnlab.models import (
    ContrastiveConfig,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    Seq2SeqConfig,
    VisionLanguageConfig,
    ViTConfig,
)
from attnlab.models.canonical import canonical
from attnlab.models.contrastive import EndOfText
from attnlab.paths import write_atomically
from attnlab.pretrained import repository, tensor_mapping, tensors, ties, tokenizer_files
from attnlab.pretrained.families import FAMILIES, Family
from attnlab.pretrained.field_types import EXPECTED, check_against_tensors
from attnlab.pretrained.hf_config import GENERATION_FIELDS, SHARED_GENERATION_FIELDS, HFConfig


class FromScratch(NamedTuple):
    """The files to export with a model that was trained from scratch.

    Attributes:
      tokenizer: the tokenizer of the run.
      length: the context length, in tokens.
      preprocessor: the settings of its images or audio, in the format of `Data.preprocessor`.
    """

    tokenizer: Tokenizer
    length: int
    preprocessor: Mapping[str, Any] | None = None


TEMPLATE_BYTES = 1 << 20
Origin: TypeAlias = epath.Path | FromScratch


def read_config(folder: epath.Path) -> tuple[Family, ModelConfig]:
    """Return the family and the model config of a checkpoint folder.

    Raises:
      InputError: an unknown `model_type`, or an unsupported value of a field.
    """
    file = folder / repository.CONFIG_FILE
    fields = repository.read_json(file) | _read_generation_config(folder)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        hint = did_you_mean(shorten(str(model_type)), FAMILIES)
        known = f"{hint} Supported: {', '.join(sorted(FAMILIES))}"
        raise InputError(f"{file}: no model_type {shorten(repr(model_type))}{known}")
    family, hf_config = FAMILIES[model_type], HFConfig(fields, str(file))
    reader = repository.SafetensorsReader(folder) if repository.has_tensors(folder) else None
    if reader is not None:
        check_against_tensors(fields, reader.shapes(), str(file))
    _check_architectures(family, hf_config)
    with untrusted.one_line_errors(str(file)):
        config = family.config(hf_config)
        if isinstance(config, DecoderConfig):  # encoder-decoders read theirs with their start token
            config = dataclasses.replace(config, generation=hf_config.generation_defaults())
        config = config if reader is None else ties.as_stored(reader, family, config)
        return family.for_config(config), config


def _check_architectures(family: Family, hf_config: HFConfig) -> None:
    """Check that a checkpoint has no other head than the one that its family reads."""
    other = r"\w*For(?!CausalLM|ConditionalGeneration)\w+"
    names = hf_config.get("architectures", ())
    if isinstance(family.architecture, str) and any(re.fullmatch(other, str(name)) for name in names):
        hf_config.require("architectures", [family.architecture])


def _read_generation_config(folder: epath.Path) -> dict[str, Any]:
    """Return the generation fields of `generation_config.json`, or {} without such a file.

    Newer checkpoints store these fields there and not in `config.json`. If the file exists, its
    `GENERATION_FIELDS` replace all of those in `config.json`, even absent ones.
    `SHARED_GENERATION_FIELDS` may be in either file.
    """
    file = folder / repository.GENERATION_CONFIG_FILE
    if not file.exists():
        return {}
    generation = repository.read_json(file)
    shared = {name: generation[name] for name in SHARED_GENERATION_FIELDS if name in generation}
    return shared | {name: generation.get(name) for name in GENERATION_FIELDS}


def read_params(folder: epath.Path, family: Family, abstract: Any) -> Any:
    """Load the parameters of a checkpoint folder with the given shardings.

    Args:
      folder: the checkpoint.
      family: the family with the tensor names.
      abstract: shapes, dtypes and shardings of the model's parameters.

    Raises:
      InputError: files that cannot be read, or tensors that do not match the config; the message
        lists all of them.
    """
    reader = repository.SafetensorsReader(folder)
    shapes = reader.shapes()
    slices = ties.stored_slices(tensor_mapping.tensor_slices(family.tensors, abstract), family, shapes)

    def is_zero(name: str) -> bool:
        return name not in shapes and tensor_mapping.matches(family.optional_zero_tensors, name)

    slices = [piece for piece in slices if not is_zero(piece.hf_name)]
    copies = ties.check_copies(reader, slices, family, str(folder))
    tensor_mapping.check(slices, shapes, (*family.ignored, *map(re.escape, copies)), str(folder))
    return tensors.load_params(reader, slices, abstract)


def read_tokenizer(folder: epath.Path) -> Tokenizer | None:
    """Return the tokenizer of a folder with its chat template, or None without tokenizer files.

    Raises:
      InputError: files that cannot be read.
    """
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", CONFIG_FILE):
        settings |= repository.read_json(folder / name) if (folder / name).exists() else {}
    if (template := folder / "chat_template.jinja").exists():
        settings["chat_template"] = untrusted.read_text(template, TEMPLATE_BYTES)
    check_settings(settings, str(folder / CONFIG_FILE))
    if (file := folder / "tokenizer.json").exists():
        backend, source_target_tokenizers = read_backend(file), None
    else:
        model_type = str(repository.read_json(folder / repository.CONFIG_FILE).get("model_type"))
        with untrusted.one_line_errors(str(folder)):
            parts = tokenizer_files.read(folder, settings, model_type)
        if parts is None:
            return None
        backend, settings, source_target_tokenizers = parts
    if "eos_token" not in settings:
        settings["eos_token"] = _eos_by_id(folder, backend)
    with untrusted.one_line_errors(str(folder)):
        return Tokenizer(backend, settings, source_target_tokenizers)


def _eos_by_id(folder: epath.Path, backend: tokenizers.Tokenizer) -> str | None:
    """Return the end-of-text token from `eos_token_id` of the model's config."""
    file = folder / repository.CONFIG_FILE
    eos_id = untrusted.Fields(repository.read_json(file), str(file), EXPECTED).get("eos_token_id")
    eos_id = next(iter(eos_id), None) if isinstance(eos_id, list) else eos_id
    return None if eos_id is None else backend.id_to_token(eos_id)


def copy_non_tensor_files(source: epath.Path, target: epath.Path) -> None:
    """Copy the config, tokenizer and preprocessor files of a checkpoint, without its tensors.

    Files that cannot be one of them, because they are too large or not regular, are not copied.

    Raises:
      InputError: one of them is a symlink to a file outside the folder.
    """
    target.mkdir(parents=True, exist_ok=True)
    files = [
        file.name
        for file in source.iterdir()
        if file.suffix in (".json", ".jinja", ".model", ".spm", ".txt") and file.name != repository.INDEX_FILE
    ]
    # Modules of a sentence encoder.
    files += [f"{file.parent.name}/{file.name}" for file in source.glob(f"*_*/{repository.CONFIG_FILE}")]
    for name in files:
        if untrusted.is_regular(source / name):
            untrusted.check_link(source, source / name)
            write_atomically(target / name, untrusted.read_bytes(source / name))


def hf_config_fields(config: ModelConfig, length: int) -> dict[str, Any]:
    """Return the `config.json` of the first family that can express a model.

    A family can express a model if importing the fields gives an equivalent config.

    Args:
      config: the model config, with `vocab_size` set.
      length: the context length, in tokens.

    Raises:
      InputError: no family can express the model; the message lists the fields that differ from the
        closest family.
    """
    tried: list[tuple[bool, int, str, list[str]]] = []
    for model_type, family in FAMILIES.items():
        if family.fields is None or type(config) is not family.config_class:
            continue
        named = {"model_type": model_type, "architectures": [family.architecture_of(config)]}
        fields = named | family.fields(config, length)
        try:
            changed = _config_differences(config, family.config(HFConfig(fields, model_type)))
        except ValueError as error:  # a required field is missing, or a value is not supported
            tried.append((True, 1, model_type, [str(error)]))
            continue
        if not changed:
            return fields
        tried.append((False, len(changed), model_type, changed))
    if not tried:
        raise InputError(f"no supported model type can express this model: none is a {_class_name(config)}")
    *_, nearest, changed = min(tried)
    # Fields of a nested config are redundant when the type of that config differs too.
    changed = [line for line in changed if "absent" not in line]
    rest = f"; and {len(changed) - 6} more" if len(changed) > 6 else ""
    raise InputError(
        f"no supported model type can express this model; the closest is {nearest}, which would need "
        f"{'; '.join(changed[:6])}{rest}"
    )


def _config_differences(before: ModelConfig, after: ModelConfig) -> list[str]:
    """List the config fields in which two models differ, with defaults filled in.

    End tokens are not compared: `write_checkpoint` writes those of the run.
    """
    if type(before) is not type(after):
        return [f"model: {_class_name(before)} -> {_class_name(after)}"]
    return differences(*(_with_eos_token_ids(canonical(config), ()) for config in (before, after)))


def _with_eos_token_ids(config: ModelConfig, ids: tuple[int, ...]) -> ModelConfig:
    """Return the config with other `GenerationDefaults.eos_token_ids`, if it has any."""
    if not isinstance(config, DecoderConfig | Seq2SeqConfig):
        return config
    generation = dataclasses.replace(config.generation, eos_token_ids=ids)
    return dataclasses.replace(config, generation=generation)


def _class_name(config: ModelConfig) -> str:
    return short_name(type(config))


def write_checkpoint(folder: epath.Path, config: ModelConfig, params: Any, origin: Origin) -> None:
    """Write a model as a checkpoint folder, atomically.

    Args:
      folder: the folder to create.
      config: the model config, with `vocab_size` set.
      params: the parameters.
      origin: for an imported model, the folder with the config and tokenizer files of the original
        checkpoint; for a model trained from scratch, its tokenizer and settings.

    Raises:
      InputError: the folder is not empty, or `config.json` cannot express the model.
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
        tied = ties.is_tied(config)
        imported = imported if tied is None else ties.with_tied(imported, tied)
        if changed := _config_differences(imported, config):
            message = "; ".join(changed)
            raise InputError(
                f"{origin / repository.CONFIG_FILE} cannot express the changes since the import: {message}"
            )
        copy_non_tensor_files(origin, temporary)
        fields = repository.read_json(temporary / repository.CONFIG_FILE)
    family = FAMILIES[fields["model_type"]].for_config(config)
    fields = family.keep_on_export(config, fields) if family.keep_on_export else fields
    fields = _untied(fields, family) if ties.is_tied(config) is False else fields
    _write_eos_token_ids(temporary, config, fields)
    fields |= {"architectures": [family.architecture_of(config)], "dtype": dtype_of(params)}
    fields.pop("torch_dtype", None)
    write_atomically(temporary / repository.CONFIG_FILE, json.dumps(fields, indent=2) + "\n")
    write_params(temporary, family, params)
    if folder.exists():
        folder.rmdir()
    temporary.rename(folder)


def _untied(fields: dict[str, Any], family: Family) -> dict[str, Any]:
    """Return the `config.json` of a model with a separate output table."""
    for name in family.tie_fields:
        part, dot, name = name.rpartition(".")
        changed = {name: False}
        fields = fields | ({part: fields[part] | changed} if dot else changed)
    return fields


def _write_eos_token_ids(folder: epath.Path, config: ModelConfig, fields: dict[str, Any]) -> None:
    """Write all end tokens of a run to `generation_config.json`, unless its files have them."""
    written = HFConfig(fields | _read_generation_config(folder), str(folder)).eos_token_ids
    if set(config.generation.eos_token_ids) <= set(written):
        return
    file = folder / repository.GENERATION_CONFIG_FILE
    generation = repository.read_json(file) if file.exists() else {}
    generation["eos_token_id"] = list(dict.fromkeys((*written, *config.generation.eos_token_ids)))
    write_atomically(file, json.dumps(generation, indent=2) + "\n")


def _with_start_token(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Return the config of an encoder-decoder with an explicit `decoder_start_token_id`."""
    # With the image inside the prompt, the tokenizer adds the first token.
    prompts = isinstance(config, VisionLanguageConfig) and config.prompt_suffix is None
    if (
        not isinstance(config, Seq2SeqConfig)
        or prompts
        or config.generation.decoder_start_token_id is not None
    ):
        return config
    start = dataclasses.replace(config.generation, decoder_start_token_id=tokenizer.bos_tokens[-1])
    return dataclasses.replace(config, generation=start)


def _label_names(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """Return the class names of an image classifier, which are the tokens of its tokenizer."""
    if not isinstance(config, ViTConfig) or config.classes != tokenizer.vocab_size:
        return {}
    names = {i: tokenizer.token_text(i) for i in range(tokenizer.vocab_size)}
    return {"id2label": names, "label2id": {name: i for i, name in names.items()}}


def _template(config: ModelConfig) -> str:
    """Return the tokenizer template of a model trained from scratch: where `EOS` is added."""
    if isinstance(config, EncoderConfig):
        return "$A"
    pooling = config.text.pooling if isinstance(config, ContrastiveConfig) else None
    ended = isinstance(pooling, EndOfText) or source_kind(config.source_shape) == "text"
    return f"$A {EOS}" if ended else f"{EOS} $A"


def dtype_of(params: Any) -> str:
    """Return the name of the parameters' dtype."""
    return jax.tree.leaves(params)[0].dtype.name


def write_params(folder: epath.Path, family: Family, params: Any) -> None:
    """Write parameters as safetensors with the tensor names and layouts of a family."""
    repository.write_safetensors(
        folder, tensors.to_tensors(tensor_mapping.tensor_slices(family.tensors, params), params)
    )


def abstract_params(config: ModelConfig, mesh: Mesh | None = None) -> Any:
    """Return the shapes, dtypes and shardings of a model's parameters.

    Without a mesh, all parameters are on the first local device.
    """

    def with_sharding(x):
        one_device = SingleDeviceSharding(jax.local_devices()[0])
        placed = one_device if mesh is None else sharding.named_sharding(mesh, x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)

    rows = 1 if mesh is None else mesh.size
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        inputs = batch_from_spec(batch_spec(rows, 1, config.source_shape), sharding.batch_zeros).inputs
        model = config.build(1)
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]
    return jax.tree.map(with_sharding, shapes)
