"""Checkpoint folders: import onto any mesh, sharded files, and reported errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from attnlab import sharding
from attnlab.generation import Generator
from attnlab.layers import Dtypes
from attnlab.layers.linear import parameter_name
from attnlab.pretrained import import_export, load, repository
from tests.pretrained.small_llama import LLAMA, write


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("checkpoint")) / "llama"
    return folder, write(folder)


@pytest.fixture
def checkpoint_copy(checkpoint, tmp_path):
    """A copy that a test may modify."""
    for file in checkpoint[0].iterdir():
        file.copy(epath.Path(tmp_path) / file.name)
    return epath.Path(tmp_path)


def test_tensor_names_and_layouts(checkpoint):
    folder, params = checkpoint
    tensors = load_file(folder / "model.safetensors")
    block = params["layers"]["periods"]["block0"]
    kernel = tensors["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(kernel.T.reshape(16, 2, 4), block["attention"]["key"]["kernel"][1])
    np.testing.assert_array_equal(
        tensors["model.layers.0.mlp.down_proj.weight"].T, block["feed_forward"]["down"]["kernel"][0]
    )
    assert len(tensors) == 3 + 2 * 9


@pytest.mark.parametrize("text", ["single", "data:2,fsdp:2,tensor:2", "fsdp:4,tensor:2"])
def test_load_onto_any_mesh(checkpoint, mesh_of, text):
    folder, params = checkpoint
    got = load(str(folder), mesh_of(text))
    for (path, actual), want in zip(
        jax.tree_util.tree_leaves_with_path(got.params), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(actual), want, err_msg=parameter_name(path))
    kernel = got.params["layers"]["periods"]["block0"]["feed_forward"]["up"]["kernel"]
    assert kernel.sharding.spec == jax.P(None, "fsdp", "tensor")


def test_load_in_requested_dtype(checkpoint):
    folder, params = checkpoint
    got = load(str(folder), dtypes=Dtypes("bfloat16", "bfloat16", "float32"))
    assert {x.dtype for x in jax.tree.leaves(got.params)} == {jnp.dtype("bfloat16")}
    for actual, want in zip(jax.tree.leaves(got.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(actual), want.astype(jnp.bfloat16))


def test_load_reads_each_tensor_once(checkpoint, monkeypatch):
    """A stacked parameter is assembled from the tensors of its layers, each read separately."""
    folder, _ = checkpoint
    names = []
    read = repository.SafetensorsReader.read
    monkeypatch.setattr(
        repository.SafetensorsReader, "read", lambda self, name: (names.append(name), read(self, name))[1]
    )
    load(str(folder))
    assert sorted(names) == sorted(load_file(folder / "model.safetensors"))


def test_sharded_files_with_an_index(checkpoint, tmp_path, monkeypatch):
    folder, params = checkpoint
    monkeypatch.setattr(repository, "MAX_SHARD_BYTES", 4000)
    target = epath.Path(tmp_path)
    import_export.copy_non_tensor_files(folder, target)
    family, _ = import_export.read_config(folder)
    import_export.write_params(target, family, params)
    names = sorted(p.name for p in target.glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    index = json.loads((target / repository.INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    for actual, want in zip(jax.tree.leaves(load(str(target)).params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(actual), want)
    (target / names[1]).unlink()
    with pytest.raises(Exception, match=f"names missing files: {names[1]}"):
        load(str(target))


def test_all_mismatches_are_reported_together(checkpoint_copy, refuses):
    tensors = load_file(checkpoint_copy / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((16, 15), np.float32)
    tensors["adapter.weight"] = np.zeros(2, np.float32)
    save_file(tensors, checkpoint_copy / "model.safetensors")
    with refuses(
        "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight",
        "unexpected: adapter.weight",
        "wrong shape: model.layers.0.self_attn.q_proj.weight (16, 15) instead of (16, 16)",
    ):
        load(str(checkpoint_copy))


def test_names_without_prefix_of_headless_checkpoints(checkpoint_copy, refuses):
    tensors = {
        n.removeprefix("model."): x for n, x in load_file(checkpoint_copy / "model.safetensors").items()
    }
    save_file(tensors, checkpoint_copy / "model.safetensors")
    load(str(checkpoint_copy))
    del tensors["lm_head.weight"]
    save_file(tensors, checkpoint_copy / "model.safetensors")
    with refuses("missing: lm_head.weight"):
        load(str(checkpoint_copy))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "no model_type 'lama'; did you mean 'llama'?"),
        ({"model_type": None}, "no model_type None"),
        ({"hidden_act": "mish"}, "hidden_act='mish' is not supported; supported: gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not supported"),
        ({"rope_scaling": {"type": "magic"}}, "rope_type='magic' is not supported"),
        (
            {"model_type": "qwen3", "layer_types": ["linear_attention"] * 2},
            "layer_types has 'linear_attention'",
        ),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "architectures=['LlamaForSequenceClassification'] is not supported; it may be ['LlamaForCausalLM']",
        ),
        ({"num_attention_heads": 3}, "kv_heads must divide heads=3"),
    ],
)
def test_unsupported_configs_are_rejected(checkpoint_copy, refuses, changes, message):
    (checkpoint_copy / "config.json").write_text(json.dumps(LLAMA | changes))
    with refuses(message):
        load(str(checkpoint_copy))


@pytest.mark.parametrize("field", ["hidden_size", "rms_norm_eps"])
def test_missing_field_is_reported(checkpoint_copy, refuses, field):
    (checkpoint_copy / "config.json").write_text(json.dumps({k: v for k, v in LLAMA.items() if k != field}))
    with refuses(f"config.json lacks {field!r}"):
        load(str(checkpoint_copy))


def test_unreadable_files_are_reported(checkpoint_copy, refuses, tmp_path_factory):
    tensors = checkpoint_copy / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with refuses("model.safetensors cannot be read"):
        load(str(checkpoint_copy))
    tensors.unlink()
    with refuses("has no model.safetensors"):
        load(str(checkpoint_copy))
    (checkpoint_copy / "pytorch_model.bin").write_bytes(b"\x80")
    with refuses("pytorch_model.bin: only model.safetensors is read, because loading a pickle can run"):
        load(str(checkpoint_copy))
    (checkpoint_copy / "config.json").write_text("{")
    with refuses("config.json cannot be read"):
        load(str(checkpoint_copy))
    with refuses("is not a checkpoint: it has no config.json"):
        load(str(tmp_path_factory.mktemp("empty")))
    with refuses("no checkpoint at nowhere: expected a folder with config.json, or a hub id"):
        load("nowhere")


@pytest.mark.parametrize(
    ("dtype", "size", "message"),
    [
        ("I32", 4, "model.norm.weight has dtype I32; weights must have BF16, F16, F32, F64"),
        ("U8", 1, "model.norm.weight has dtype U8"),
        ("BOOL", 1, "model.norm.weight has dtype BOOL"),
        ("C64", 8, "model.norm.weight has dtype C64"),
        ("F8_E4M3", 1, "dtype F8_E4M3; weights must have BF16, F16, F32, F64; quantised checkpoints are not"),
        ("F32", 4, "all elements of model.norm.weight are NaN"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(checkpoint_copy, refuses, dtype, size, message):
    tensors = load_file(checkpoint_copy / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, checkpoint_copy / "model-1.safetensors")
    end = 16 * size
    header = {"model.norm.weight": {"dtype": dtype, "shape": [16], "data_offsets": [0, end]}}
    data = json.dumps(header).encode()
    nan = np.full(16, np.nan, np.float32).tobytes()
    (checkpoint_copy / "model-2.safetensors").write_bytes(
        len(data).to_bytes(8, "little") + data + (nan if dtype == "F32" else bytes(end))
    )
    names = dict.fromkeys(tensors, "model-1.safetensors") | {"model.norm.weight": "model-2.safetensors"}
    (checkpoint_copy / "model.safetensors").unlink()
    (checkpoint_copy / repository.INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    with refuses(message):
        load(str(checkpoint_copy))


def test_prompts_with_tokens_that_the_model_lacks_are_refused(tmp_path, refuses):
    """Tokens that were added to a tokenizer have no row in the embedding table."""
    folder = epath.Path(tmp_path) / "llama"
    write(folder, LLAMA | {"vocab_size": 270})
    model, params, tokenizer = load(str(folder))
    mesh = sharding.make_mesh(sharding.parse_mesh("single", 1))
    ids = tokenizer.encode_prompt("the cat sat")
    assert max(ids) >= 270
    with refuses("has the id", "but the model has only 270 tokens"):
        Generator(model, params, tokenizer, 64, mesh)(["the cat sat"], max_new_tokens=2)
    with refuses(f"to {max(ids)} are out of range: the table has rows 0 to 269"):
        model.apply({"params": params}, jnp.asarray([ids]))


def test_end_tokens_survive_import_and_export(checkpoint_copy, tmp_path_factory):
    """Newer checkpoints list end tokens in `generation_config.json`, which goes first."""
    (checkpoint_copy / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": [5, 6]}))
    assert load(str(checkpoint_copy)).config.generation.eos_token_ids == (5, 6)
    (checkpoint_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    model, params, tokenizer = load(str(checkpoint_copy))
    assert model.config.generation.eos_token_ids == (0, 7)
    for origin in (checkpoint_copy, import_export.FromScratch(tokenizer, 64)):
        folder = epath.Path(tmp_path_factory.mktemp("exported")) / "llama"
        import_export.write_checkpoint(folder, model.config, params, origin)
        assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [0, 7]}
        assert load(str(folder)).config.generation.eos_token_ids == (0, 7)


def test_hub_id_without_network(refuses, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refuses("nobody/nothing is not a local folder and cannot be downloaded from the hub: "):
        load("nobody/nothing")


def test_load_returns_the_tokenizer(checkpoint, checkpoint_copy):
    tokenizer = load(str(checkpoint[0])).tokenizer
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert tokenizer.encode_prompt("") == [tokenizer.eos_id]
    (checkpoint_copy / "tokenizer.json").unlink()
    assert load(str(checkpoint_copy)).tokenizer is None


def test_unrolled_layers_give_the_same_logits(checkpoint):
    folder, _ = checkpoint
    stacked, unrolled = load(str(folder)), load(str(folder), unrolled=True)
    assert len(unrolled.params["layers"]["tail"]) == unrolled.config.depth == 2
    tokens = jnp.arange(7)[None] + 3
    wanted, got = (p.model.apply({"params": p.params}, tokens) for p in (stacked, unrolled))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
