import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnlab.attention import causal, reference, segments, window
from attnlab.errors import InputError
from attnlab.inspect.maps import attention_maps
from attnlab.layers import AttentionConfig, Bidirectional, Causal, NoPositions, Sliding
from attnlab.models import DecoderConfig, EncoderConfig, Seq2SeqConfig
from attnlab.sharding import BATCH_AXES

TOKENS = np.random.default_rng(0).integers(0, 11, (2, 6)).astype(np.int32)
IDS = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0]], np.int32)
SPECS = (Sliding(2), Causal())


def start(**options):
    config = DecoderConfig(
        width=16, attention=AttentionConfig(heads=4, kv_heads=2), positions=NoPositions(), **options
    )
    model = config.build(11)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    return model, jax.tree.map(lambda x: 10 * x if x.ndim > 2 else x, params)


def test_rows_with_allowed_keys_sum_to_one():
    model, params = start(depth=2, pattern=SPECS)
    maps = attention_maps(model, params, tokens=TOKENS, segment_ids=IDS)
    assert maps.shape == (2, 2, 4, 6, 6)
    total = np.broadcast_to((IDS > 0)[None, :, None], maps.shape[:-1])
    np.testing.assert_allclose(maps.sum(-1), total, atol=1e-5)


def test_first_layer_matches_manual_computation():
    model, params = start(depth=1, pattern=SPECS[:1])
    (got,) = attention_maps(model, params, tokens=TOKENS, segment_ids=IDS)
    block = jax.tree.map(lambda x: x[0], params["layers"]["periods"]["block0"])
    x = params["embedding"]["table"][TOKENS]
    x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    kernels = (block["attention"][name]["kernel"] for name in ("query", "key", "value"))
    q, k, v = (jnp.einsum("bte,ehd->bthd", x, kernel) for kernel in kernels)
    mask = causal() & window(1, 0) & segments(jnp.asarray(IDS))
    *_, expected = reference(q, k, v, mask=mask, score=None, scale=0.5)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_single_row_on_mesh_with_scanned_layers(mesh_of):
    """Scanned and unscanned layers shard a batch of one row differently."""
    config = EncoderConfig(
        depth=3, width=16, attention=AttentionConfig(heads=4), skip_first_attention_norm=True
    )
    model, tokens = config.build(11), jnp.asarray(TOKENS[:1])
    with jax.set_mesh(mesh_of("single")):
        params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
        maps = attention_maps(model, params, tokens=tokens)
    expected = attention_maps(model, jax.device_get(params), tokens=np.asarray(tokens))
    np.testing.assert_allclose(maps, expected, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 3, 5])
@pytest.mark.parametrize("scan", [True, False])
def test_layers_are_in_order(depth, scan):
    pattern = (Sliding(2), Bidirectional(), Causal())
    model, params = start(depth=depth, pattern=pattern, scan=scan)
    maps = attention_maps(model, params, tokens=TOKENS)
    i, j = np.indices((6, 6))
    allowed = [(j <= i) & (j > i - 2), i == i, j <= i]
    assert len(maps) == depth
    for layer, map_ in enumerate(maps):
        np.testing.assert_array_equal((map_ > 0).all(axis=(0, 1)), allowed[layer % 3])
    # Layers with equal specs differ, since each one reads the output of the previous layer.
    for a in range(3, depth):
        assert not np.allclose(maps[a], maps[a - 3], atol=1e-4)


def test_order_of_layers_with_equal_specs():
    """A change to the weights of a layer changes its own map and those of later layers only."""
    model, params = start(depth=4, pattern=SPECS)
    expected = attention_maps(model, params, tokens=TOKENS)
    for layer in range(4):
        period, block = divmod(layer, 2)
        path = params["layers"]["periods"][f"block{block}"]["attention"]["query"]
        changed = jax.tree.map(lambda x: x, params)
        kernel = path["kernel"]
        changed["layers"]["periods"][f"block{block}"]["attention"]["query"] = {
            "kernel": kernel.at[period].multiply(-1)
        }
        maps = attention_maps(model, changed, tokens=TOKENS)
        same = [np.allclose(a, b, atol=1e-6) for a, b in zip(maps, expected, strict=True)]
        assert same == [n < layer for n in range(4)]


def test_maps_do_not_depend_on_mesh(mesh_of):
    model, params = start(depth=3, pattern=SPECS)
    expected = attention_maps(model, params, tokens=np.tile(TOKENS, (2, 1)), segment_ids=np.tile(IDS, (2, 1)))
    mesh = mesh_of("data:2,fsdp:2,tensor:2")
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, P(BATCH_AXES, None))
        tokens, ids = (jax.device_put(np.tile(x, (2, 1)), rows) for x in (TOKENS, IDS))
        params = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, P())), params)
        got = attention_maps(model, params, tokens=tokens, segment_ids=ids)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "inputs", "message"),
    [
        ((), {"branch": "atention"}, "no branch 'atention' in stack 'layers'; .*stack 'layers': attention"),
        ((), {"stack": "encoder/layers"}, "in stack 'encoder/layers'; the model has stack 'layers'"),
        ((TOKENS,), {}, "takes inputs as keyword arguments: stack must be a string, got ndarray"),
        ((), {"tokens": TOKENS.tolist()}, "tokens must be an array, got list"),
    ],
)
def test_invalid_arguments_are_reported(arguments, inputs, message):
    model, params = start(depth=1)
    inputs = inputs if arguments else {"tokens": TOKENS} | inputs
    with pytest.raises(InputError, match=message):
        attention_maps(model, params, *arguments, **inputs)


def test_missing_stack_error_lists_encoder_decoder_stacks():
    half = {"depth": 1, "width": 16, "attention": AttentionConfig(heads=4)}
    model = Seq2SeqConfig(EncoderConfig(**half), DecoderConfig(**half)).build(11)
    inputs = {"tokens": TOKENS, "source": TOKENS}
    params = jax.jit(model.init)(jax.random.key(0), **inputs)["params"]
    expected = (
        r"(?=.*stack 'encoder/layers': attention\b)(?=.*stack 'decoder/layers': attention, cross_attention)"
    )
    with pytest.raises(InputError, match=expected):
        attention_maps(model, params, **inputs)
