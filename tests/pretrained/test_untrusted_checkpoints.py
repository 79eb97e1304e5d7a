"""Checkpoints with damaged, lying or malicious files end in one line."""

import ast
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from etils import epath
from safetensors.numpy import save_file

from attnlab.data import Tokenizer
from attnlab.pretrained import field_types, import_export, repository
from attnlab.pretrained.families import FAMILIES
from attnlab.pretrained.hf_config import HFConfig
from attnlab.pretrained.sentences import load as load_sentences
from tests.pretrained.small_llama import LLAMA

WRONG = [None, True, -1, 0, 2.5, "2", "x", [], [1], {}, {"a": 1}, 10**12, -(10**12), 1e300]
FIELDS = [name for name in LLAMA if name not in ("model_type", "architectures", "max_position_embeddings")]
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}


def folder_with(path, fields=LLAMA, **files):
    """Write a folder with a config and other files, whose names have `__` for a dot."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields))
    for name, content in files.items():
        file = path / name.replace("__", ".")
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return epath.Path(path)


@pytest.mark.parametrize("name", FIELDS)
def test_config_fields_of_a_wrong_type_are_named(tmp_path, refuses, name):
    allowed = {
        "rope_theta": (None, 2.5, 10**12),
        "rms_norm_eps": (0,),
        "num_key_value_heads": (None,),
        "tie_word_embeddings": (None, True),
    }
    for value in WRONG:
        if not any(value is x or value == x != 1 for x in allowed.get(name, ())):
            with refuses("config.json", name):
                import_export.read_config(folder_with(tmp_path, LLAMA | {name: value}))


@pytest.mark.parametrize(
    "rope",
    [
        5,
        "x",
        [1],
        {"full_attention": 5},
        {"rope_type": ["yarn"]},
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": "2"},
        {"rope_type": "dynamic", "factor": None},
        {"rope_type": "llama3", "factor": 2.0},
        {"rope_type": "longrope"},
        {"rope_type": "longrope", "short_factor": 1, "long_factor": [1.0]},
        {"rope_type": "longrope", "short_factor": ["1"], "long_factor": [1.0]},
        {"rope_type": "yarn", "factor": "x"},
        YARN | {"original_max_position_embeddings": 0},
        YARN | {"original_max_position_embeddings": [32]},
        YARN | {"beta_fast": "32"},
        {"rope_theta": "1e4"},
        {"rope_theta": 0.5},
        {"partial_rotary_factor": 2},
    ],
)
@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_rope_fields_of_a_wrong_type_are_named(tmp_path, refuses, name, rope):
    field = (
        next((key for key, value in rope.items() if key != "rope_type"), "") if isinstance(rope, dict) else ""
    )
    with refuses("config.json", name if not field.startswith("original") else field):
        import_export.read_config(folder_with(tmp_path, LLAMA | {name: rope}))


@pytest.mark.parametrize("value", [["llama"], {"a": 1}, None, 5, "x" * 10_000])
def test_model_type_of_a_wrong_type(tmp_path, refuses, value):
    with refuses("no model_type", "llama"):
        import_export.read_config(folder_with(tmp_path, LLAMA | {"model_type": value}))


@pytest.mark.parametrize(
    ("model_type", "name", "value"),
    [
        ("clip", "text_config", [1]),
        ("clip", "text_config", {"hidden_size": "32"}),
        ("clip", "vision_config", "x"),
        ("vision-encoder-decoder", "encoder", None),
        ("whisper", "forced_decoder_ids", [[1]]),
        ("whisper", "suppress_tokens", ["a"]),
        ("bart", "bad_words_ids", [5]),
        ("bart", "eos_token_id", {"a": 1}),
        ("t5", "feed_forward_proj", ["relu"]),
    ],
)
def test_fields_of_other_families_are_checked(model_type, name, value, refuses):
    hf = HFConfig({"text_config": {}, "vision_config": {}, name: value}, "config.json")
    with refuses("config.json", name.removesuffix("_config") if value is None else name):
        if name in (
            "forced_decoder_ids",
            "suppress_tokens",
            "bad_words_ids",
            "eos_token_id",
            "feed_forward_proj",
        ):
            hf.get(name)
        else:
            FAMILIES[model_type].config(hf)


def test_every_field_that_families_read_has_a_type():
    """A field without a type would be used unchecked."""
    missing = set()
    for file in [
        *Path(field_types.__file__).parent.glob("families/*.py"),
        Path(field_types.__file__).parent / "hf_config.py",
    ]:
        for node in ast.walk(ast.parse(file.read_text())):
            name, owner = None, ""
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                name, owner = node.slice.value, ast.unparse(node.value)
            elif (
                isinstance(node, ast.Call)
                and ast.unparse(node.func).endswith((".get", ".part", ".activation"))
                and node.args
            ):
                owner, name = ast.unparse(node.func).rpartition(".")[0], getattr(node.args[0], "value", None)
            if isinstance(name, str) and owner in (
                "hf",
                "text",
                "image",
                "hf_decoder",
                "hf_encoder",
                "self",
                "rope",
            ):
                table = field_types.EXPECTED_ROPE if owner == "rope" else field_types.EXPECTED
                missing |= {(owner, name)} - {(owner, known) for known in table}
    assert missing == set()


def test_counts_and_sizes_are_compared_with_the_tensors(tmp_path, refuses):
    folder_with(tmp_path)
    shape = np.zeros((300, 16), np.float32)
    tensors = {f"model.layers.{i}.x.weight": np.zeros((64, 4), np.float32) for i in range(2)}
    save_file(tensors | {"model.embed_tokens.weight": shape}, tmp_path / "model.safetensors")
    assert import_export.read_config(folder_with(tmp_path))[1].depth == 2
    for name, value in {
        "num_hidden_layers": 1000,
        "hidden_size": 10**6,
        "vocab_size": 10**7,
        "intermediate_size": 301,
    }.items():
        with refuses("config.json", f"{name}={value}", "2 layers" if name == "num_hidden_layers" else "300"):
            import_export.read_config(folder_with(tmp_path, LLAMA | {name: value}))
    vision = {"model_type": "vit", "image_size": [512, 512], "patch_size": 4}
    with refuses("image_size and patch_size give 16384"):
        import_export.read_config(folder_with(tmp_path, vision))
    with refuses("max_source_positions=1500"):
        import_export.read_config(
            folder_with(tmp_path, {"model_type": "whisper", "max_source_positions": 1500})
        )
    nested = {"model_type": "clip", "text_config": {"num_hidden_layers": 500}, "vision_config": {}}
    with refuses("text_config", "num_hidden_layers=500"):
        import_export.read_config(folder_with(tmp_path, nested))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"5",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"hidden_size": NaN}',
        b'{"a":1,"a":2}',
    ],
)
def test_json_files_of_a_checkpoint_are_checked(tmp_path, refuses, content):
    for name in ("config.json", "generation_config.json"):
        folder = folder_with(tmp_path / name, LLAMA, **{name.replace(".", "__"): content})
        with refuses(name):
            import_export.read_config(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"):
        folder = folder_with(tmp_path / name, LLAMA, **{name.replace(".", "__"): content})
        with refuses(name):
            import_export.read_tokenizer(folder)


@pytest.mark.parametrize(
    "weight_map",
    [None, 5, "x", [], ["a"], {}, {"a": 1}, {"a": None}, {"a": ["b"]}, {"a": {"b": 1}}, {"a": "../x.safetensors"}, {"a": "/x"}, {"a": ""},
     {"a": "absent.safetensors"}, {"a": "x" * 400}, {"a": "b\0"}],
)  # fmt: skip
def test_index_names_only_files_in_its_folder(tmp_path, refuses, weight_map):
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    folder = folder_with(tmp_path / "folder", model__safetensors__index__json={"weight_map": weight_map})
    with refuses("folder"):
        repository.SafetensorsReader(folder)


def test_index_without_weight_map(tmp_path, refuses):
    with refuses("lacks 'weight_map'"):
        repository.SafetensorsReader(folder_with(tmp_path, model__safetensors__index__json={}))


def test_special_files_are_refused(tmp_path, refuses):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "vocab.txt"):
        folder = folder_with(tmp_path / name)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        with refuses(name, "FIFO"):
            import_export.read_config(folder)
            import_export.read_tokenizer(folder)
        (folder / name).unlink()
        (folder / name).mkdir()
        with refuses(name, "folder"):
            import_export.read_config(folder)
            import_export.read_tokenizer(folder)


def test_files_are_not_copied_through_symlinks_out_of_the_folder(tmp_path, refuses):
    (tmp_path / "secret.txt").write_text("secret")
    folder = folder_with(tmp_path / "a")
    (tmp_path / "a" / "merges.txt").symlink_to("../secret.txt")
    with refuses("merges.txt is a symlink"):
        import_export.copy_non_tensor_files(folder, epath.Path(tmp_path / "copy"))
    (tmp_path / "b" / "1_Pooling").parent.mkdir()
    (tmp_path / "b" / "1_Pooling").symlink_to(tmp_path / "a")
    with refuses("1_Pooling/config.json is a symlink"):
        import_export.copy_non_tensor_files(epath.Path(tmp_path / "b"), epath.Path(tmp_path / "copy2"))


def test_special_and_large_files_are_not_copied(tmp_path):
    folder = folder_with(tmp_path / "a", small__txt=b"x")
    os.mkfifo(folder / "fifo.txt")
    os.symlink("/dev/zero", folder / "zero.json")
    (folder / "folder.json").mkdir()
    (folder / "large.json").touch()
    os.truncate(folder / "large.json", 1 << 40)
    import_export.copy_non_tensor_files(folder, epath.Path(tmp_path / "copy"))
    assert {file.name for file in (tmp_path / "copy").iterdir()} == {"config.json", "small.txt"}


def test_files_of_a_download_cache_are_copied(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "x").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/x")
    import_export.copy_non_tensor_files(epath.Path(snapshot), epath.Path(tmp_path / "copy"))
    copied = tmp_path / "copy" / "config.json"
    assert copied.read_text() == "{}" and not copied.is_symlink()


WORDS = {"[UNK]": 0, "a": 1, "</s>": 2}
BACKEND = json.loads(tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="[UNK]")).to_str())


def with_vocabulary(**changes):
    return BACKEND | {"model": BACKEND["model"] | {"vocab": WORDS | changes}}


@pytest.mark.parametrize("number", [300_000_000, 2**32 - 1, -1, 2**40, "1", None])
def test_ids_of_a_vocabulary_are_bounded(tmp_path, refuses, number):
    folder = folder_with(
        tmp_path, tokenizer__json=with_vocabulary(b=number), tokenizer_config__json={"eos_token": "</s>"}
    )
    with refuses(str(tmp_path)):
        import_export.read_tokenizer(folder)
    with refuses(str(tmp_path)):
        Tokenizer.load(tmp_path / "tokenizer.json")


def replace(content):
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_replacements_that_grow_without_bound_are_refused(tmp_path, refuses, part):
    steps = {"type": "Sequence", f"{part}s": [replace("aa")] * 40}
    folder = folder_with(
        tmp_path,
        tokenizer__json=with_vocabulary() | {part: steps},
        tokenizer_config__json={"eos_token": "</s>"},
    )
    with refuses("tokenizer.json", "times longer"):
        import_export.read_tokenizer(folder)
    steps[f"{part}s"] = [replace("aa"), replace("\u2581")]
    folder_with(tmp_path, tokenizer__json=with_vocabulary() | {part: steps})
    assert import_export.read_tokenizer(folder).eos_id == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": {"x": 1}},
        {"eos_token": ["</s>"]},
        {"eos_token": 5},
        {"bos_token": {"content": 5}},
        {"tokenizer_class": ["x"]},
        {"chat_template": 5},
        {"chat_template": [{"name": "default"}]},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"x": "a"}},
        {"added_tokens_decoder": {"300000000": "a"}},
        {"added_tokens_decoder": {"9" * 5000: "a"}},
        {"added_tokens_decoder": {"3": 5}},
        {"additional_special_tokens": 5},
        {"additional_special_tokens": [5]},
        {"extra_ids": 10**12},
        {"extra_ids": "5"},
        {"do_lower_case": "yes"},
    ],
)
def test_tokenizer_settings_of_a_wrong_type_are_named(tmp_path, refuses, settings):
    folder = folder_with(tmp_path, vocab__txt=b"[UNK]\n[SEP]\n[CLS]\n", tokenizer_config__json=settings)
    (name,) = settings
    with refuses("tokenizer_config.json", name):
        import_export.read_tokenizer(folder)


@pytest.mark.parametrize(
    ("kind", "name", "files"),
    [
        ("Bert", "vocab.txt", {"vocab__txt": b"\xff\xfe\n[UNK]\n"}),
        ("Bert", "vocab.txt", {"vocab__txt": b""}),
        ("Bert", "vocab.txt", {"vocab__txt": b"a\nb\n"}),
        ("GPT2", "vocab.json", {"vocab__json": {"a": "x"}, "merges__txt": b""}),
        ("GPT2", "vocab.json", {"vocab__json": {"a": 3 * 10**8}, "merges__txt": b""}),
        ("GPT2", "vocab.json", {"vocab__json": {"a": -1}, "merges__txt": b""}),
        ("GPT2", "vocab.json", {"vocab__json": [], "merges__txt": b""}),
        ("GPT2", "vocab.json", {"merges__txt": b"a b"}),
        ("GPT2", "merges.txt", {"vocab__json": {"a": 1}, "merges__txt": b"zz y"}),
        ("GPT2", "merges.txt", {"vocab__json": {"a": 1}, "merges__txt": b"a b c"}),
        ("GPT2", "merges.txt", {"vocab__json": {"a": 1}, "merges__txt": b"\xff"}),
        (
            "GPT2",
            "added_tokens.json",
            {"vocab__json": {"a": 0}, "merges__txt": b"", "added_tokens__json": {"b": "1"}},
        ),
        ("Roberta", "merges.txt", {"vocab__json": {"a": 1}, "merges__txt": b""}),
        ("CLIP", "merges.txt", {"vocab__json": {"a": 1}, "merges__txt": b""}),
        ("Llama", "tokenizer.model", {"tokenizer__model": b""}),
        ("Llama", "tokenizer.model", {"tokenizer__model": b"\xff" * 100}),
        ("Marian", "vocab.json", {"source__spm": b""}),
    ],
)
def test_vocabulary_files_are_named(tmp_path, refuses, kind, name, files):
    folder = folder_with(tmp_path, tokenizer_config__json={"tokenizer_class": f"{kind}Tokenizer"}, **files)
    with refuses(name):
        import_export.read_tokenizer(folder)


def test_text_that_the_backend_refuses(tmp_path, refuses):
    backend = with_vocabulary()
    backend["model"]["unk_token"] = "absent"
    folder = folder_with(tmp_path, tokenizer__json=backend, tokenizer_config__json={"eos_token": "</s>"})
    tokenizer = import_export.read_tokenizer(folder)
    with refuses("'zz' is not in the vocabulary"):
        tokenizer.encode("zz")
    tokenizer.settings["chat_template"] = "zz"
    calls = ((tokenizer.encode_source, "zz"), (tokenizer.encode_document, "zz"), (tokenizer.encode_chat, []))
    for encode, text in calls:
        with refuses("this text cannot be tokenized: Exception: WordLevel error"):
            encode(text)


@pytest.mark.parametrize(
    "modules", [b"", b"{}", b"5", b"[5]", b"[]", [{"type": 5}], [{"type": "x.Transformer", "path": 5}]]
)
def test_modules_of_a_sentence_encoder_are_checked(tmp_path, refuses, modules):
    with refuses("modules.json"):
        load_sentences(str(folder_with(tmp_path, modules__json=modules)))
