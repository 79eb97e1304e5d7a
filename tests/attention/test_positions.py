import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from attnlab.attention.absolute_positions import learned, sinusoidal
from attnlab.attention.positions import (
    NTK,
    DynamicNTK,
    LinearScaling,
    Llama3,
    LongRoPE,
    YaRN,
    axial,
    frequencies,
    multimodal,
    rotary,
    rotate,
    xpos,
)

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 2, 8)), jnp.float32)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.sampled_from([0.25, 0.5, 0.8, 1.0]))
def test_rotary_products_depend_only_on_distance(i, j, shift, fraction):
    def product(i, j):
        rotated = [rotary(x, jnp.full((2, 3), at), fraction=fraction) for x, at in ((X, i), (X[::-1], j))]
        return (rotated[0] * rotated[1]).sum(-1)

    np.testing.assert_allclose(product(i, j), product(i + shift, j + shift), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_rotary_rotates_fraction_and_preserves_norm(fraction):
    positions = jnp.array([[0, 3, 70], [5, 1, 9]])
    rotated = rotary(X, positions, fraction=fraction)
    width = int(8 * fraction)
    np.testing.assert_allclose(jnp.linalg.norm(rotated, axis=-1), jnp.linalg.norm(X, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(rotated[..., width:], X[..., width:])
    np.testing.assert_array_equal(rotated[0, 0], X[0, 0])
    assert (rotated[1, 0, :, :width] != X[1, 0, :, :width]).all()


def test_rotary_uses_float32_angles_for_bfloat16():
    positions = jnp.full((2, 3), 1001)  # 1001 is not representable in bfloat16
    exact = rotary(X.astype(jnp.bfloat16).astype(jnp.float32), positions)
    got = rotary(X.astype(jnp.bfloat16), positions)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("width", [6, 5])
def test_sinusoidal_matches_formula(width):
    got = sinusoidal(jnp.array([[0, 1, 7]]), width)
    assert got.shape == (1, 3, width)
    for t, position in enumerate((0, 1, 7)):
        for i in range(width):
            angle = position / 10_000 ** (i // 2 * 2 / width)
            np.testing.assert_allclose(got[0, t, i], [np.sin(angle), np.cos(angle)][i % 2], atol=1e-6)


HALVES_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # interleaved order -> order of halves


def test_interleaved_is_permutation_of_halves():
    positions = jnp.array([[0, 3, 70], [5, 1, 9]])
    interleaved = rotary(X, positions, interleaved=True)
    np.testing.assert_allclose(
        interleaved[..., HALVES_ORDER], rotary(X[..., HALVES_ORDER], positions), rtol=1e-6
    )
    assert (interleaved[0, 1] != rotary(X, positions)[0, 1]).any()


def test_interleaved_pairs_rotate_as_complex_numbers():
    angles = np.random.default_rng(1).uniform(-9, 9, size=(2, 3, 3)).astype(np.float32)
    factor = np.random.default_rng(2).uniform(0.5, 2, size=(2, 3, 3)).astype(np.float32)
    pairs = np.asarray(X, np.float64)[..., :6].reshape(2, 3, 2, 3, 2)
    rotated = (pairs[..., 0] + 1j * pairs[..., 1]) * (factor * np.exp(1j * angles))[:, :, None]
    got = rotate(X, jnp.asarray(angles), factor=jnp.asarray(factor), interleaved=True)
    np.testing.assert_allclose(got[..., :6:2], rotated.real, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[..., 1:6:2], rotated.imag, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[..., 6:], X[..., 6:])


GRID = np.array([[[0, 3], [2, 9], [5, 1]], [[1, 1], [4, 0], [0, 7]]])
VIDEO = np.concatenate([GRID, GRID[..., :1] + 3], axis=-1)
ROTATIONS = {
    "interleaved": (partial(rotary, interleaved=True), GRID[..., 0]),
    "axial": (axial, GRID),
    "axial, interleaved": (partial(axial, interleaved=True), GRID),
    "multimodal": (partial(multimodal, sections=(1, 1, 2)), VIDEO),
    "scaled": (partial(rotary, scaling=Llama3(4.0, 64)), GRID[..., 1]),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_products_depend_only_on_distances_along_each_axis(name):
    embed, positions = ROTATIONS[name]

    def products(shift):
        queries, keys = (
            embed(X, jnp.asarray(positions + shift)),
            embed(X[::-1], jnp.asarray(positions[::-1] + shift)),
        )
        return np.einsum("bthd,bshd->bhts", queries, keys)

    shift = np.array([31, 7, 12])[: positions.shape[-1]] if positions.ndim == 3 else 31
    np.testing.assert_allclose(products(shift), products(0), rtol=1e-4, atol=1e-4)
    rotated = embed(X, jnp.asarray(positions))
    np.testing.assert_allclose(jnp.linalg.norm(rotated, axis=-1), jnp.linalg.norm(X, axis=-1), rtol=1e-5)
    assert (np.abs(products(0) - np.einsum("bthd,bshd->bhts", X, X[::-1])) > 1e-2).any()


def test_axial_rows_rotate_first_half_and_columns_second_half():
    rows, columns = jnp.asarray(GRID[..., 0]), jnp.asarray(GRID[..., 1])
    for interleaved in (False, True):
        halves = (slice(4), slice(4, 8)) if interleaved else (np.array([0, 1, 4, 5]), np.array([2, 3, 6, 7]))
        got = axial(X, jnp.asarray(GRID), interleaved=interleaved)
        for half, positions in zip(halves, (rows, columns), strict=True):
            expected = rotary(X[..., half], positions, interleaved=interleaved)
            np.testing.assert_allclose(got[..., half], expected, rtol=1e-6)


def test_multimodal_sections_use_positions_of_their_axis():
    got = multimodal(X, jnp.asarray(VIDEO), (1, 1, 2), interleaved=True)
    for pair, axis in enumerate((0, 1, 2, 2)):
        expected = rotary(X, jnp.asarray(VIDEO[..., axis]), interleaved=True)
        at = slice(2 * pair, 2 * pair + 2)
        np.testing.assert_allclose(got[..., at], expected[..., at], rtol=1e-6)


def test_xpos_products_decay_with_distance():
    queries, keys = jnp.array([[900, 2, 40]] * 2), jnp.array([[100, 1, 65]] * 2)
    q = np.asarray(xpos(X, queries, keys=False, base=64.0, interleaved=True), np.float64)
    k = np.asarray(xpos(X[::-1], keys, keys=True, base=64.0, interleaved=True), np.float64)
    got = (q * k).sum(-1)
    x = np.asarray(X, np.float64)[..., ::2] + 1j * np.asarray(X, np.float64)[..., 1::2]
    for b, t, h in np.ndindex(2, 3, 2):
        distance = int(queries[b, t] - keys[b, t])
        expected = 0
        for i in range(4):
            rate = (2 * i / 8 + 0.4) / 1.4
            rotated = (
                x[b, t, h, i] * np.conj(x[1 - b, t, h, i]) * np.exp(1j * distance * 10_000 ** (-2 * i / 8))
            )
            expected += rotated.real * rate ** (distance / 64)
        np.testing.assert_allclose(got[b, t, h], expected, rtol=1e-3, atol=1e-4)


def scaled_frequencies(scaling, width=64, theta=10_000.0, length=1):
    return np.asarray(scaling(width, theta, jnp.arange(length)[None]), np.float64)


def test_linear_scaling_divides_positions():
    positions = jnp.array([[0, 8, 400], [4, 12, 64]])
    got = rotary(X, positions, scaling=LinearScaling(4.0))
    np.testing.assert_allclose(got, rotary(X, positions // 4), rtol=1e-5, atol=1e-5)


def test_ntk_scaling_increases_theta():
    got = scaled_frequencies(NTK(8.0))
    np.testing.assert_allclose(got, (10_000 * 8 ** (64 / 62)) ** (-np.arange(0, 64, 2) / 64), rtol=1e-5)
    plain = np.asarray(frequencies(64))
    np.testing.assert_allclose(got[[0, -1]], plain[[0, -1]] / [1, 8], rtol=1e-5)
    np.testing.assert_array_equal(scaled_frequencies(NTK(8.0), width=2), 1)


def test_dynamic_ntk_starts_beyond_original_length():
    scaling = DynamicNTK(2.0, 100)
    np.testing.assert_array_equal(scaled_frequencies(scaling, length=100), frequencies(64))
    np.testing.assert_allclose(
        scaled_frequencies(scaling, length=250), scaled_frequencies(NTK(1 + 2 * 1.5)), rtol=1e-5
    )


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_scales_only_low_frequencies(truncate):
    turns = 4096 / (2 * np.pi) * np.asarray(frequencies(64), np.float64)
    slowed = np.asarray(frequencies(64), np.float64) / scaled_frequencies(YaRN(16.0, 4096, truncate=truncate))
    often, rarely = np.flatnonzero(turns > 32), np.flatnonzero(turns < 1)
    assert often.size and rarely.size
    # Truncation widens the ramp by less than one pair on each side.
    often, rarely = (often[:-1], rarely[1:]) if truncate else (often, rarely)
    np.testing.assert_allclose(slowed[often], 1, rtol=1e-5)
    np.testing.assert_allclose(slowed[rarely], 16, rtol=1e-5)
    # Within the ramp, frequencies decrease linearly from the full value to a sixteenth.
    share = (1 / slowed[often[-1] + 2 : rarely[0] - 1] - 1 / 16) / (1 - 1 / 16)
    assert share.size > 5 and (share > 0).all() and (share < 1).all()
    np.testing.assert_allclose(np.diff(share), np.diff(share)[0], rtol=1e-3)


def test_llama3_scaling_depends_on_turns():
    got = scaled_frequencies(Llama3(8.0, 8192, slow=1.0, fast=4.0), theta=500_000.0)
    kinds = set()
    for i in range(32):
        plain = 500_000.0 ** (-2 * i / 64)
        turns = 8192 * plain / (2 * math.pi)
        kind = "often" if turns > 4 else "rarely" if turns < 1 else "between"
        smooth = {"often": 1, "rarely": 0, "between": (turns - 1) / (4 - 1)}[kind]
        np.testing.assert_allclose(got[i], (1 - smooth) * plain / 8 + smooth * plain, rtol=1e-5)
        kinds.add(kind)
    assert kinds == {"often", "rarely", "between"}


def test_longrope_uses_short_and_long_factors():
    scaling = LongRoPE((1.0, 1.5, 2.0, 3.0), (1.0, 4.0, 8.0, 9.0), 100, 4.0)
    plain = np.asarray(frequencies(8), np.float64)
    np.testing.assert_allclose(scaled_frequencies(scaling, 8, length=100), plain / scaling.short, rtol=1e-6)
    np.testing.assert_allclose(scaled_frequencies(scaling, 8, length=101), plain / scaling.long, rtol=1e-6)


@pytest.mark.parametrize(
    "scaling, factor",
    [
        (YaRN(16.0, 100), 0.1 * math.log(16) + 1),
        (YaRN(0.5, 100), 1),
        (YaRN(16.0, 100, temperature=0.7), 0.7),
        (LongRoPE((1.0, 1.0), (2.0, 2.0), 100, 4.0), math.sqrt(1 + math.log(4) / math.log(100))),
        (LinearScaling(16.0), 1),
    ],
)
def test_attention_factor_scales_only_rotated_elements(scaling, factor):
    rotated = rotary(X, jnp.array([[0, 3, 70], [5, 1, 9]]), fraction=0.5, scaling=scaling)
    norms, before = (jnp.linalg.norm(x[..., :4], axis=-1) for x in (rotated, X))
    np.testing.assert_allclose(norms, factor * before, rtol=1e-5)
    np.testing.assert_array_equal(rotated[..., 4:], X[..., 4:])


TABLE = jnp.asarray(np.random.default_rng(3).normal(size=(5, 3)), jnp.float32)


def test_learned_positions_gather_rows_and_their_gradients():
    positions = jnp.array([[0, 4, 4], [2, 0, 4]])
    np.testing.assert_array_equal(learned(positions, TABLE), np.asarray(TABLE)[np.asarray(positions)])
    gradient = jax.grad(lambda table: learned(positions, table).sum())(TABLE)
    np.testing.assert_array_equal(gradient, np.array([2, 0, 1, 0, 3.0])[:, None] * np.ones(3))


@pytest.mark.parametrize("outside", [5, -1])
def test_learned_rejects_positions_outside_table(refuses, outside):
    positions = jnp.array([[0, outside, 4]])
    with refuses("rows 0 to 4", str(outside)):
        learned(positions, TABLE)
    got = jax.jit(learned)(positions, TABLE)
    assert jnp.isnan(got[0, 1]).all()
    np.testing.assert_array_equal(got[0, ::2], TABLE[jnp.array([0, 4])])


def test_rejects_invalid_arguments(refuses):
    with refuses("10 rotary pairs", "head_dim of at least 20", "it is 8"):
        rotate(X, jnp.zeros((1, 3, 10)))
    with refuses("axial", "3 axes", "divisible by 6", "it is 8"):
        axial(X, jnp.asarray(VIDEO))
    with refuses("multimodal", "2 sections", "3 axes"):
        multimodal(X, jnp.asarray(VIDEO), (2, 2))
    with refuses("5 rotary pairs", "it is 8"):
        multimodal(X, jnp.asarray(VIDEO), (1, 1, 3))
    with refuses("LongRoPE", "8 needs 4", "got 4 and 3"):
        rotary(X, jnp.asarray(GRID[..., 0]), scaling=LongRoPE((1.0,) * 4, (1.0,) * 3, 10, 2.0))


def test_outputs_keep_sharding_of_tokens(mesh_of):
    def rotated(x, positions, video, table):
        scaled = rotary(x, positions, scaling=DynamicNTK(2.0, 4))
        return (
            scaled,
            multimodal(x, video, (1, 1, 2)),
            xpos(x, positions, keys=True),
            learned(positions, table),
        )

    arrays = X, jnp.asarray(GRID[..., 0]) % 5, jnp.asarray(VIDEO), TABLE
    specs = P("data", None, "tensor", None), P("data", None), P("data", None, None), P()
    expected = rotated(*arrays)
    with jax.set_mesh(mesh_of("data:2,tensor:2")):
        got = jax.jit(rotated)(*map(jax.device_put, arrays, specs))
    for actual, desired in zip(got, expected, strict=True):
        assert actual.sharding.spec[0] == "data"
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-6)


@pytest.mark.parity
def test_parity_with_llama():
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    positions = np.array([[0, 1, 2], [7, 100, 31]])
    frequencies = 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    angles = torch.tensor(np.tile(positions[..., None] * frequencies, 2), dtype=torch.float32)
    x = torch.tensor(np.asarray(X)).transpose(1, 2)
    expected, _ = llama.apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())
    got = rotary(X, jnp.asarray(positions))
    np.testing.assert_allclose(got, expected.transpose(1, 2).numpy(), rtol=1e-5, atol=1e-5)


SCALED = {
    "linear": (LinearScaling(4.0), {"rope_type": "linear", "factor": 4.0}, 1),
    "dynamic": (DynamicNTK(3.0, 64), {"rope_type": "dynamic", "factor": 3.0}, 200),
    "dynamic, short": (DynamicNTK(3.0, 64), {"rope_type": "dynamic", "factor": 3.0}, 20),
    "yarn": (YaRN(8.0, 64), {"rope_type": "yarn", "factor": 8.0}, 1),
    "yarn with all options": (
        YaRN(8.0, 64, fast=7.0, slow=2.0, truncate=False, temperature=1.5),
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "beta_fast": 7.0,
            "beta_slow": 2.0,
            "truncate": False,
            "attention_factor": 1.5,
        },
        1,
    ),
    "longrope, short": (
        LongRoPE((1.0, 1.5, 2.0, 3.0), (1.0, 4.0, 8.0, 9.0), 64, 4.0),
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.5, 2.0, 3.0],
            "long_factor": [1.0, 4.0, 8.0, 9.0],
            "factor": 4.0,
        },
        64,
    ),
    "longrope, long": (
        LongRoPE((1.0, 1.5, 2.0, 3.0), (1.0, 4.0, 8.0, 9.0), 64, 4.0),
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.5, 2.0, 3.0],
            "long_factor": [1.0, 4.0, 8.0, 9.0],
            "factor": 4.0,
        },
        65,
    ),
    "llama3": (
        Llama3(8.0, 64, slow=1.0, fast=4.0),
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        1,
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", SCALED)
def test_parity_of_scalings(name):
    pytest.importorskip("torch")
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    scaling, parameters, length = SCALED[name]
    width = 8 if name.startswith("longrope") else 64
    parameters = {**parameters, "rope_theta": 10_000.0, "original_max_position_embeddings": 64}
    config = llama.LlamaConfig(head_dim=width, max_position_embeddings=64, rope_parameters=parameters)
    desired, factor = rope.ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, None, seq_len=length)
    np.testing.assert_allclose(scaled_frequencies(scaling, width, length=length), desired, rtol=1e-5)
    np.testing.assert_allclose(scaling.attention_factor, factor, rtol=1e-6)


@pytest.mark.parity
def test_parity_of_interleaved_pairs_with_gptj():
    torch = pytest.importorskip("torch")
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    positions = np.array([[0, 1, 2], [7, 100, 31]])
    angles = torch.tensor(positions[..., None] * 10_000.0 ** (-np.arange(0, 8, 2) / 8), dtype=torch.float32)
    expected = gptj.apply_rotary_pos_emb(torch.tensor(np.asarray(X)), angles.sin(), angles.cos())
    got = rotary(X, jnp.asarray(positions), interleaved=True)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parity
def test_parity_of_multimodal_with_qwen():
    torch = pytest.importorskip("torch")
    qwen = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    config = qwen.Qwen2VLTextConfig(
        hidden_size=16,
        num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]},
    )
    x = torch.tensor(np.asarray(X)).transpose(1, 2)
    cos, sin = qwen.Qwen2VLRotaryEmbedding(config)(x, torch.tensor(np.moveaxis(VIDEO, -1, 0).copy()))
    expected, _ = qwen.apply_rotary_pos_emb(x, x, cos, sin)
    got = multimodal(X, jnp.asarray(VIDEO), (1, 1, 2))
    np.testing.assert_allclose(got, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parity
def test_parity_of_axial_with_qwen():
    torch = pytest.importorskip("torch")
    qwen = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    config = qwen.Qwen2VLVisionConfig(embed_dim=16, num_heads=2)
    x = torch.tensor(np.asarray(X)).reshape(6, 2, 8)
    cos, sin = qwen.Qwen2VLVisionRotaryEmbedding(config)(x, torch.tensor(GRID.reshape(6, 2)))
    expected, _ = qwen.apply_rotary_pos_emb_vision(x, x, cos, sin)
    got = axial(X, jnp.asarray(GRID))
    np.testing.assert_allclose(got.reshape(6, 2, 8), expected, rtol=1e-5, atol=1e-5)
