"""Folders of checkpoints: read onto any mesh, written whole, and refused with all that is wrong."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from attnlab.layers import Dtypes
from attnlab.layers.parameters import parameter_name
from attnlab.pretrained import import_export, load, repository
from tests.pretrained.small_llama import LLAMA, write


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("made")) / "llama"
    return folder, write(folder)


@pytest.fixture
def copied(made, tmp_path):
    """A copy that a test may spoil."""
    for file in made[0].iterdir():
        file.copy(epath.Path(tmp_path) / file.name)
    return epath.Path(tmp_path)


def test_names_and_layouts_are_those_of_the_table(made):
    folder, params = made
    found = load_file(folder / "model.safetensors")
    block = params["layers"]["periods"]["block0"]
    kernel = found["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(kernel.T.reshape(16, 2, 4), block["attention"]["key"]["kernel"][1])
    np.testing.assert_array_equal(
        found["model.layers.0.mlp.down_proj.weight"].T, block["feed_forward"]["down"]["kernel"][0]
    )
    assert len(found) == 3 + 2 * 9


@pytest.mark.parametrize("text", ["single", "data:2,fsdp:2,tensor:2", "fsdp:4,tensor:2"])
def test_read_onto_any_mesh_it_is_the_same(made, mesh_of, text):
    folder, params = made
    got = load(str(folder), mesh_of(text))
    for (path, ours), want in zip(
        jax.tree_util.tree_leaves_with_path(got.params), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(ours), want, err_msg=parameter_name(path))
    kernel = got.params["layers"]["periods"]["block0"]["feed_forward"]["up"]["kernel"]
    assert kernel.sharding.spec == jax.P(None, "fsdp", "tensor")


def test_in_the_dtype_asked_for(made):
    folder, params = made
    got = load(str(folder), dtypes=Dtypes("bfloat16", "bfloat16", "float32"))
    assert {x.dtype for x in jax.tree.leaves(got.params)} == {jnp.dtype("bfloat16")}
    for ours, want in zip(jax.tree.leaves(got.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), want.astype(jnp.bfloat16))


def test_never_more_than_a_tensor_is_read_at_once(made, monkeypatch):
    """A whole leaf is put together from the tensors of its layers, each asked for by itself."""
    folder, _ = made
    asked = []
    read = repository.SafetensorsReader.read
    monkeypatch.setattr(
        repository.SafetensorsReader, "read", lambda self, name: (asked.append(name), read(self, name))[1]
    )
    load(str(folder))
    assert sorted(asked) == sorted(load_file(folder / "model.safetensors"))


def test_in_several_files_with_an_index(made, tmp_path, monkeypatch):
    folder, params = made
    monkeypatch.setattr(repository, "MAX_SHARD_BYTES", 4000)
    target = epath.Path(tmp_path)
    import_export.copy_non_tensor_files(folder, target)
    family, _ = import_export.read_config(folder)
    import_export.write_params(target, family, params)
    names = sorted(p.name for p in target.glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    index = json.loads((target / repository.INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    for ours, want in zip(jax.tree.leaves(load(str(target)).params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), want)
    (target / names[1]).unlink()
    with pytest.raises(Exception, match=f"names files that are not there: {names[1]}"):
        load(str(target))


def test_all_that_is_wrong_is_told_at_once(copied, refuses):
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((16, 15), np.float32)
    tensors["adapter.weight"] = np.zeros(2, np.float32)
    save_file(tensors, copied / "model.safetensors")
    with refuses(
        "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight",
        "too many: adapter.weight",
        "misshapen: model.layers.0.self_attn.q_proj.weight (16, 15) in place of (16, 16)",
    ):
        load(str(copied))


def test_without_the_head_names_lack_their_prefix(copied, refuses):
    tensors = {n.removeprefix("model."): x for n, x in load_file(copied / "model.safetensors").items()}
    save_file(tensors, copied / "model.safetensors")
    load(str(copied))
    del tensors["lm_head.weight"]
    save_file(tensors, copied / "model.safetensors")
    with refuses("missing: lm_head.weight"):
        load(str(copied))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "lama"}, "no model_type 'lama'; did you mean 'llama'?"),
        ({"model_type": None}, "no model_type None"),
        ({"hidden_act": "mish"}, "hidden_act='mish' is not supported; there are gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not supported"),
        ({"rope_scaling": {"type": "magic"}}, "rope_type='magic' is not supported"),
        (
            {"model_type": "qwen3", "layer_types": ["linear_attention"] * 2},
            "layer_types has 'linear_attention'",
        ),
        ({"num_attention_heads": 3}, "kv_heads must divide heads=3"),
    ],
)
def test_configs_that_are_refused(copied, refuses, changes, said):
    (copied / "config.json").write_text(json.dumps(LLAMA | changes))
    with refuses(said):
        load(str(copied))


@pytest.mark.parametrize("field", ["hidden_size", "rms_norm_eps"])
def test_a_field_that_is_lacking(copied, refuses, field):
    (copied / "config.json").write_text(json.dumps({k: v for k, v in LLAMA.items() if k != field}))
    with refuses(f"config.json lacks {field!r}"):
        load(str(copied))


def test_files_that_are_refused(copied, refuses, tmp_path_factory):
    tensors = copied / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with refuses("model.safetensors cannot be read"):
        load(str(copied))
    tensors.unlink()
    with refuses("has no model.safetensors"):
        load(str(copied))
    (copied / "pytorch_model.bin").write_bytes(b"\x80")
    with refuses("pytorch_model.bin: only model.safetensors is read, for a pickle can run any code"):
        load(str(copied))
    (copied / "config.json").write_text("{")
    with refuses("config.json cannot be read"):
        load(str(copied))
    with refuses("is no checkpoint: it has no config.json"):
        load(str(tmp_path_factory.mktemp("empty")))
    with refuses("no checkpoint at nowhere: expected a folder with config.json, or a hub id"):
        load("nowhere")


def test_a_hub_id_without_a_network(refuses, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refuses("nobody/nothing is no folder here, and the hub does not give it: "):
        load("nobody/nothing")


def test_the_tokenizer_comes_along(made, copied):
    found = load(str(made[0])).tokenizer
    assert found.decode(found.encode("the cat")) == "the cat"
    assert found.encode_prompt("") == [found.eos_id]
    (copied / "tokenizer.json").unlink()
    assert load(str(copied)).tokenizer is None


def test_each_layer_by_itself_it_is_the_same_model(made):
    folder, _ = made
    stacked, unrolled = load(str(folder)), load(str(folder), unrolled=True)
    assert len(unrolled.params["layers"]["tail"]) == unrolled.config.depth == 2
    tokens = jnp.arange(7)[None] + 3
    wanted, got = (found.model.apply({"params": found.params}, tokens) for found in (stacked, unrolled))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
