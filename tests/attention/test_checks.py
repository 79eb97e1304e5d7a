"""Constructors of masks, scores, normalizers and positions reject arguments of a wrong kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention as attn
from attnlab.attention import normalizers
from attnlab.attention.arrays import check_array, check_number, describe

NAN, INF = float("nan"), float("inf")
IDS, FLOATS = jnp.ones((2, 6), int), jnp.ones((2, 6))
X, POSITIONS = jnp.ones((1, 6, 2, 8)), jnp.arange(6)[None]
TABLE = jnp.ones((5, 4))
NOT_INTEGERS = (2.5, True, "2", None, jnp.ones(()), np.float32(2), 1j)

# Constructors of one integer, with the name of that argument.
INTEGERS = {
    "causal offset": attn.causal,
    "window left": lambda x: attn.window(2.5 if x is None else x),
    "window right": lambda x: attn.window(None, 2.5 if x is None else x),
    "window offset": lambda x: attn.window(1, 1, x),
    "prefix length": attn.prefix,
    "prefix offset": lambda x: attn.prefix(1, x),
    "key_lengths keys": attn.key_lengths,
    "key_lengths queries": lambda x: attn.key_lengths(3, 2.5 if x is None else x),
    "chunked size": attn.chunked,
    "chunked offset": lambda x: attn.chunked(2, x),
    "block_causal size": attn.block_causal,
    "block_diffusion length": lambda x: attn.block_diffusion(x, 2),
    "block_diffusion size": lambda x: attn.block_diffusion(4, x),
    "sinks_and_window sinks": lambda x: attn.sinks_and_window(x, 2),
    "sinks_and_window left": lambda x: attn.sinks_and_window(1, x),
    "islands offset": lambda x: attn.islands(IDS, x),
    "shared_prefix offset": lambda x: attn.shared_prefix(IDS, x),
    "media tokens": lambda x: attn.media(IDS == 1, x),
    "tree prefix": lambda x: attn.tree((-1, 0), x),
    "dilated step": attn.dilated,
    "dilated left": lambda x: attn.dilated(2, 2.5 if x is None else x),
    "strided stride": attn.strided,
    "global_tokens offset": lambda x: attn.global_tokens((1,), x),
    "blocks size": lambda x: attn.blocks(np.ones((2, 2), bool), x),
    "bigbird length": attn.bigbird,
    "bigbird random": lambda x: attn.bigbird(8, 2, random=x),
    "neighbourhood shape": lambda x: attn.neighbourhood(x, 1),
    "neighbourhood window": lambda x: attn.neighbourhood((8, 8), (1, x)),
    "neighbourhood dilation": lambda x: attn.neighbourhood(8, 1, x),
    "sliding_tile shape": lambda x: attn.sliding_tile((8, x), (2, 2), (1, 1)),
    "sliding_tile tile": lambda x: attn.tile_order((8, 8), (2, x)),
    "sliding_tile window": lambda x: attn.sliding_tile((8, 8), (2, 2), (1, x)),
    "shift_mask offset": lambda x: attn.shift_mask(attn.causal(), x),
    "alibi heads": attn.alibi,
    "alibi offset": lambda x: attn.alibi(4, x),
    "relative_bias offset": lambda x: attn.relative_bias(TABLE, x),
    "t5_bias max_distance": lambda x: attn.t5_bias(jnp.ones((32, 4)), max_distance=x),
    "step_temperature floor": lambda x: attn.step_temperature(IDS, x),
    "sigmoid length": normalizers.sigmoid,
    "top_k k": normalizers.top_k,
    "sinusoidal width": lambda x: attn.sinusoidal(POSITIONS, x),
    "multimodal pairs": lambda x: attn.multimodal(X, POSITIONS[..., None], (x,)),
    "YaRN original": lambda x: attn.YaRN(2.0, x),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_required(refuses, unchecked, name):
    function, argument = name.split()
    for value in NOT_INTEGERS:
        with refuses(function, argument):
            INTEGERS[name](value)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: attn.window(-1), "left must be at least 0"),
        (lambda: attn.window(None, -1), "right must be at least 0"),
        (lambda: attn.dilated(2, -1), "left must be at least 0"),
        (lambda: attn.dilated(0), "step must be at least 1"),
        (lambda: attn.key_lengths(-1), "keys must be at least 0"),
        (lambda: attn.prefix(-1), "length must be at least 0"),
        (lambda: attn.tree((-1,), -2), "prefix must be at least 0"),
        (lambda: attn.sliding_tile((8, 8), (0, 2), (1, 1)), "tile must be at least 1"),
        (lambda: attn.bigbird(8, 2, seed=-1), "seed must be at least 0"),
        (lambda: attn.step_temperature(IDS, 0), "floor must be at least 1"),
        (lambda: attn.sinusoidal(POSITIONS, 0), "width must be at least 1"),
    ],
)
def test_integers_below_the_least_are_rejected(refuses, unchecked, make, words):
    with refuses(words):
        make()


NUMBERS = {
    "softcap cap": attn.softcap,
    "shaw scale": lambda x: attn.shaw(X, jnp.ones((5, 8)), scale="1" if x is None else x),
    "step_temperature coefficient": lambda x: attn.step_temperature(IDS, 2, x),
    "log_temperature scale": lambda x: attn.log_temperature(IDS, x),
    "rotary theta": lambda x: attn.rotary(X, POSITIONS, theta=x),
    "rotary fraction": lambda x: attn.rotary(X, POSITIONS, fraction=x),
    "xpos base": lambda x: attn.xpos(X, POSITIONS, keys=True, base=x),
    "NTK factor": attn.NTK,
    "LinearScaling factor": attn.LinearScaling,
    "DynamicNTK factor": lambda x: attn.DynamicNTK(x, 8),
    "YaRN factor": lambda x: attn.YaRN(x, 8),
    "YaRN temperature": lambda x: attn.YaRN(2.0, 8, temperature="1" if x is None else x),
    "LongRoPE short": lambda x: attn.LongRoPE((1.0, "1" if x is None else x), (1.0, 1.0), 8, 2.0),
    "Llama3 slow": lambda x: attn.Llama3(slow="1" if x is None else x),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_finite_numbers_are_required(refuses, unchecked, name):
    function, argument = name.split()
    for value in (NAN, INF, -INF, True, "2", None, 1j, np.float32(NAN), jnp.float32(INF)):
        with refuses(function, argument):
            NUMBERS[name](value)
    if name not in ("shaw scale", "step_temperature coefficient", "log_temperature scale"):
        for value in (0, -1.0):
            with refuses(function, argument, "greater than 0"):
                NUMBERS[name](value)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: attn.segments(FLOATS), "queries must be of integer dtype, not an array of float32 (2, 6)"),
        (lambda: attn.segments(IDS == 1), "queries must be of integer dtype"),
        (lambda: attn.segments(IDS, FLOATS), "keys must be of integer dtype"),
        (lambda: attn.segments(IDS[0]), "queries must have 2 dimensions"),
        (lambda: attn.segments([[1, 1]]), "queries must be an array"),
        (lambda: attn.key_lengths(IDS == 1), "keys must be an integer or an integer array of 1 dimension"),
        (lambda: attn.key_lengths(IDS), "of 1 dimension"),
        (lambda: attn.islands(FLOATS), "islands: ids"),
        (lambda: attn.shared_prefix(FLOATS), "shared_prefix: ids"),
        (lambda: attn.media(IDS, 2), "compare it, as in x == 1"),
        (lambda: attn.tree((-1.0, 0.5)), "tree: parents"),
        (lambda: attn.global_tokens((1.5,)), "positions must be of integer dtype"),
        (lambda: attn.blocks(np.ones((2, 2)), 2), "allowed must be of boolean dtype"),
        (lambda: attn.blocks(np.ones(2, bool), 2), "2 to 4 dimensions"),
        (lambda: attn.mask_fn(True), "takes a function"),
        (lambda: attn.score_fn(attn.softcap(2.0)), "score, b, h, q, k"),
        (lambda: attn.bias(IDS == 1), "pass a boolean array as mask="),
        (lambda: attn.bias(IDS), "convert integers with"),
        (lambda: attn.bias(2.0), "must be an array"),
        (lambda: attn.bias(jnp.ones((1,) * 5)), "0 to 4 dimensions"),
        (lambda: attn.alibi(2.5), "the number of heads must be at least 1"),
        (lambda: attn.alibi(IDS[0]), "slopes must be of floating dtype"),
        (lambda: attn.alibi(FLOATS), "slopes must have 1 dimension"),
        (lambda: attn.relative_bias(IDS[:1]), "relative_bias: table"),
        (lambda: attn.t5_bias(IDS), "t5_bias: table"),
        (lambda: attn.shaw(X.astype(int), TABLE), "shaw: query"),
        (lambda: attn.cope(X, X, IDS, attn.causal()), "cope: table"),
        (lambda: attn.cope(X, X, TABLE, FLOATS), "a mask must be boolean"),
        (lambda: attn.temperature(2.0), "factor must be an array"),
        (lambda: attn.temperature(FLOATS), "factor must have 4 dimensions"),
        (lambda: attn.step_temperature(FLOATS), "positions must be of integer dtype"),
        (lambda: attn.log_temperature(FLOATS, 1.0), "positions must be of integer dtype"),
        (lambda: attn.log_temperature(IDS, IDS[0]), "scale must be of floating dtype"),
        (lambda: attn.forgetting(FLOATS), "3 dimensions"),
        (lambda: attn.rotary(X.astype(int), POSITIONS), "rotary: x must be of floating dtype"),
        (lambda: attn.rotary(X, POSITIONS == 1), "rotary: positions must be of integer dtype"),
        (lambda: attn.rotary(X, POSITIONS[0]), "rotary: positions must have 2 dimensions"),
        (lambda: attn.rotary(X, POSITIONS, fraction=1.5), "fraction must be at most 1"),
        (lambda: attn.rotary(X, POSITIONS, scaling=2.0), "scaling must be a Scaling"),
        (lambda: attn.axial(X.astype(int), POSITIONS[..., None]), "axial: x"),
        (lambda: attn.rotate(X, jnp.ones((1, 6, 2), int)), "rotate: angles"),
        (lambda: attn.learned(FLOATS, TABLE), "learned: positions"),
        (lambda: attn.learned(POSITIONS, TABLE.astype(int)), "learned: table"),
    ],
)
def test_arrays_of_a_wrong_kind_are_rejected(refuses, unchecked, make, words):
    with refuses(words):
        make()


def test_traced_values_are_accepted():
    def masks(one, ids):
        two = one + 1
        lengths = ids[:, 0] + 2
        return [
            attn.causal(one) & attn.window(2, 1, one),
            attn.prefix(two, one) | attn.prefix(lengths),
            attn.key_lengths(lengths, two) | attn.key_lengths(two),
            attn.chunked(2, one) | attn.block_causal(2, one) | attn.strided(2, one),
            attn.sinks_and_window(1, 1, one) | attn.dilated(2, 2, 2, one),
            attn.segments(ids) & attn.islands(ids, one) | attn.shared_prefix(ids, one),
            attn.shift_mask(attn.causal(one), lengths) | attn.shift_mask(attn.causal(), one),
            attn.global_tokens(ids[:, :1], one) | attn.tree(ids[:, :1] - 2, two),
            attn.blocks(ids[None, None, :2, :3] == 1, 2) | attn.media(ids == 1, 2),
        ]

    def materialize(one, ids):
        return [mask.materialize(6, 6, 2, 1) for mask in masks(one, ids)]

    assert len(jax.eval_shape(materialize, 1, IDS)) == len(masks(1, IDS))
    cap = jax.jit(lambda cap: attn.softcap(cap)(FLOATS[None, None], None))(2.0)
    np.testing.assert_allclose(cap, 2 * np.tanh(0.5) * FLOATS[None, None], rtol=1e-6)


def test_numpy_integers_count_as_integers():
    for mask in (attn.chunked(np.int64(2)), attn.window(np.int32(1), np.int64(0)), attn.causal(np.int64(1))):
        assert mask.materialize(3, 3).shape == (1, 1, 3, 3)
    assert attn.alibi(np.int64(4)).slopes.shape == (4,)


def test_messages_describe_the_value():
    assert describe(np.ones((2, 3))) == "an array of float64 (2, 3)"
    assert describe(0.5) == "0.5"
    assert describe(attn.causal) == "causal"
    assert len(describe(list(range(100)))) == 80
    with pytest.raises(
        ValueError, match=r"x must have 1 to 2 dimensions, not an array of float32 \(1, 1, 1\)"
    ):
        check_array("x", jnp.ones((1, 1, 1)), "floating", range(1, 3))
    with pytest.raises(ValueError, match="f: x must be greater than 0, not 0"):
        check_number("f", 0, x=0)
