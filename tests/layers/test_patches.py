import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import InputError
from attnlab.layers.linear import Dtypes
from attnlab.layers.patches import PatchEmbedding, patchify, resize_positions
from attnlab.sharding import BATCH_AXES

RNG = np.random.default_rng(0)
CASES = [((8, 8), 4), ((6, 20), (3, 4)), ((5, 7), (5, 1)), ((4, 6, 8), (2, 3, 4)), ((12,), 3)]


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("sides, size", CASES)
def test_patchify_orders_patches_row_by_row(sides, size):
    x = normal(2, *sides, 3)
    each = (size,) * len(sides) if isinstance(size, int) else size
    grid = [side // p for side, p in zip(sides, each, strict=True)]
    got = patchify(x, size)
    assert got.shape == (2, np.prod(grid), np.prod(each) * 3)
    for token, place in enumerate(np.ndindex(*grid)):
        box = tuple(slice(i * p, (i + 1) * p) for i, p in zip(place, each, strict=True))
        np.testing.assert_array_equal(got[:, token], x[:, *box].reshape(2, -1))


@pytest.mark.parity
@pytest.mark.parametrize("size", [2, (2, 3), (4, 6)])
def test_patch_embedding_matches_torch_convolution(size):
    torch = pytest.importorskip("torch")
    torch_module = torch.nn.Conv2d(3, 5, size, stride=size)
    x = normal(2, 8, 12, 3)
    channels_first = torch.tensor(np.asarray(x.transpose(0, 3, 1, 2)))
    expected = torch_module(channels_first).detach().flatten(2).transpose(1, 2)
    weight, bias = (p.detach().numpy() for p in torch_module.parameters())
    params = {"kernel": jnp.asarray(weight.transpose(2, 3, 1, 0)), "bias": jnp.asarray(bias)}
    got = PatchEmbedding(size, 5, 0.5, True, Dtypes()).apply({"params": params}, x)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_patch_embedding_sharded_matches_single_device(mesh_of, bias):
    module, x = PatchEmbedding((2, 3), 6, 0.5, bias, Dtypes()), normal(8, 4, 9, 3)

    def loss(params, x):
        y = module.apply({"params": params}, x)
        return jnp.sum(jnp.sin(y)), y

    params = jax.tree.map(lambda p: normal(*p.shape), module.init(jax.random.key(0), x)["params"])
    (_, expected), gradients = jax.value_and_grad(loss, has_aux=True)(params, x)
    mesh = mesh_of("data:2,fsdp:2,tensor:2")
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.P(BATCH_AXES))
        init = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
        assert init["kernel"].sharding.spec == jax.P(None, None, None, "fsdp")
        params = jax.tree.map(lambda p, like: jax.device_put(p, like.sharding.spec), params, init)
        (_, got), got_gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, x)
        assert jax.typeof(got).sharding.spec == jax.P(BATCH_AXES, None, None)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        assert got_gradients[name].sharding.spec == init[name].sharding.spec
        np.testing.assert_allclose(got_gradients[name], gradient, rtol=1e-5, atol=1e-5)


def test_patch_embedding_computes_in_compute_dtype():
    module, x = PatchEmbedding(2, 5, 0.5, True, Dtypes(compute="bfloat16")), normal(1, 4, 4, 3)
    params = module.init(jax.random.key(0), x)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert module.apply(params, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("sides, size, message", [
    ((8, 9), 4, "cannot split 8 x 9 pixels into patches of 4 x 4"),
    ((8, 8), (4, 3), "cannot split 8 x 8 pixels into patches of 4 x 3"),
    ((8, 8), (4, 4, 4), "cannot split 8 x 8 pixels into patches of 4 x 4 x 4"),
])  # fmt: skip
def test_patchify_rejects_indivisible_sides(sides, size, message):
    with pytest.raises(InputError, match=message):
        patchify(normal(1, *sides, 3), size)


GRIDS = [
    ((4, 4), (7, 5)),
    ((4, 4), (3, 2)),
    ((3, 5), (3, 9)),
    ((2, 2), (8, 1)),
    ((1, 1), (2, 3)),
    ((14, 14), (16, 16)),
]


@pytest.mark.parity
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("old, new", GRIDS)
def test_resize_positions_matches_torch(old, new, antialias):
    torch = pytest.importorskip("torch")
    table, g = normal(2 + old[0] * old[1], 6), normal(2 + new[0] * new[1], 6)
    got, pull = jax.vjp(lambda table: resize_positions(table, old, new, 2, antialias), table)
    torch_table = torch.tensor(np.asarray(table), requires_grad=True)
    grid = torch_table[2:].reshape(1, *old, 6).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=new, mode="bicubic", antialias=antialias)
    expected = torch.cat([torch_table[:2], grid.permute(0, 2, 3, 1).reshape(-1, 6)])
    np.testing.assert_allclose(got, expected.detach().numpy(), rtol=1e-5, atol=1e-5)
    expected.backward(torch.tensor(np.asarray(g)))
    np.testing.assert_allclose(pull(g)[0], torch_table.grad.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name, prefix, antialias", [
    ("ViT", 1, False), ("Dinov2", 1, False), ("Dinov2WithRegisters", 1, True), ("SiglipVision", 0, False),
])  # fmt: skip
@pytest.mark.parametrize("height, width", [(40, 24), (16, 16), (32, 32)])
def test_resize_positions_matches_transformers(name, prefix, antialias, height, width):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = getattr(transformers, f"{name}Config")(image_size=32, patch_size=8, **small)
    embeddings = getattr(transformers, f"{name}Model")(config).embeddings
    (table,) = (p for key, p in embeddings.named_parameters() if "position" in key)
    with torch.no_grad():
        table.normal_()
        tokens = torch.zeros(1, prefix + height // 8 * (width // 8), 8)
        expected = embeddings.interpolate_pos_encoding(tokens, height, width)[0].numpy()
    rows = jnp.asarray(table.detach().numpy().reshape(-1, 8))
    got = resize_positions(rows, (4, 4), (height // 8, width // 8), prefix, antialias)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("antialias", [False, True])
def test_resize_positions_keeps_constant_table(antialias):
    table = jnp.concatenate([normal(3, 4), jnp.full((12, 4), 0.7)])
    got = resize_positions(table, (3, 4), (5, 2), 3, antialias)
    np.testing.assert_array_equal(got[:3], table[:3])
    np.testing.assert_allclose(got[3:], 0.7, rtol=1e-6)
    assert resize_positions(table, (3, 4), (3, 4), 3, antialias) is table


def test_resize_positions_on_mesh_repeats_single_device(mesh_of):
    table = normal(17, 4)
    expected = resize_positions(table, (4, 4), (6, 3), 1)
    with jax.set_mesh(mesh_of("data:2,fsdp:2,tensor:2")):
        got = jax.jit(resize_positions, static_argnums=(1, 2, 3))(
            jax.device_put(table, jax.P()), (4, 4), (6, 3), 1
        )
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_resize_positions_rejects_wrong_row_count():
    with pytest.raises(InputError, match="17 positions does not match 4 x 4 patches and 0 prefix tokens"):
        resize_positions(normal(17, 4), (4, 4), (2, 2))
