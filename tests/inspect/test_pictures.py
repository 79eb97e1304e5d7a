import time
import warnings
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from attnlab.errors import InputError
from attnlab.inspect.pictures import (
    Look,
    arcs,
    head_grid,
    legible,
    looks,
    mask_grid,
    over_image,
    save,
    training_curve,
)

SENTENCE = ["The", "animal", "didn't", "cross", "the", "street", "because", "it", "was", "too", "tired"]
TWIN = [*SENTENCE[:-1], "wide"]


@pytest.fixture(autouse=True)
def no_warnings():
    """A missing glyph or a bad layout warns; no picture may."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def attention(*shape):
    weights = np.random.default_rng(0).exponential(size=shape)
    return weights / weights.sum(-1, keepdims=True)


def svg(figure, tmp_path):
    """The SVG's source, after checking that both files are valid; it holds each text as a comment."""
    png, vector = save(figure, tmp_path / "deep" / "er" / "figure.v1")
    assert (png.name, vector.name) == ("figure.v1.png", "figure.v1.svg")
    with Image.open(png) as image:
        image.verify()
    ElementTree.parse(vector)
    return vector.read_text()


@pytest.mark.parametrize(
    ("token", "drawn"),
    [
        ("the", "the"),
        ("Ġthe", "the"),
        ("▁the", "the"),
        ("##ing", "##ing"),
        ("\n", r"\n"),
        ("Ċ", r"\n"),
        (" ", "␣"),
        ("ĠĠ", "␣␣"),
        ("", ""),
        ("\x00\x1b", r"\x00\x1b"),
        ("café", "café"),
        ("\U000f0000", r"\U000f0000"),
        ("\ud800", r"\ud800"),
        ("a" * 30, "a" * 17 + "…"),
    ],
)
def test_legible(token, drawn):
    assert legible(token) == drawn


def test_head_grid_names_heads_and_tokens(tmp_path):
    source = svg(head_grid(attention(2, 3, 11, 11), SENTENCE, "Who attends to whom"), tmp_path)
    assert all(
        f"<!-- {word} -->" in source for word in [*SENTENCE, "layer 2 / head 3", "Who attends to whom"]
    )


def test_head_grid_of_cross_attention_names_both_sides(tmp_path):
    source = svg(head_grid(attention(1, 2, 2, 3), ["ein", "Hund"], sources=["a", "small", "dog"]), tmp_path)
    assert all(f"<!-- {word} -->" in source for word in ["ein", "Hund", "a", "small", "dog"])


def test_head_grid_of_words_over_a_long_source_names_the_words(tmp_path):
    source = svg(head_grid(attention(1, 2, 2, 99), ["forty", "two"], sources=["frame"] * 99), tmp_path)
    assert "<!-- forty -->" in source and "frame" not in source and "<!-- 50 -->" in source


def test_head_grid_of_one_token_one_head(tmp_path):
    assert "<!-- only -->" in svg(head_grid(np.ones((1, 1, 1, 1)), ["only"]), tmp_path)


def test_head_grid_of_nothing_attended(tmp_path):
    svg(head_grid(np.zeros((1, 1, 2, 2)), ["a", "b"]), tmp_path)


def test_head_grid_of_many_tokens_is_quick_and_numbers_them(tmp_path):
    start = time.perf_counter()
    source = svg(head_grid(attention(4, 4, 200, 200), ["word"] * 200), tmp_path)
    assert time.perf_counter() - start < 5
    assert "<!-- word -->" not in source and "<!-- 150 -->" in source


@pytest.mark.parametrize(
    "token", ["$x_1$", "日本", "\n", "\x07", "<&>", "--", "\u0301", "😀", "שלום", "\\frac"]
)
def test_odd_tokens_can_be_drawn(token, tmp_path):
    svg(head_grid(attention(1, 1, 2, 2), [token, "x"], title=token), tmp_path)
    svg(looks([(["a", token], 0, attention(1, 2, 2), 1)]), tmp_path)


def test_mask_grid_draws_what_is_allowed_and_names_it(tmp_path):
    masks = {"causal()": np.tril(np.ones((4, 4), bool)), "first two": np.arange(5)[None] < [[2]] * 3}
    figure = mask_grid(masks, "Masks")
    for axes, mask in zip(figure.axes[1:], masks.values(), strict=True):
        (mesh,) = axes.collections
        np.testing.assert_array_equal(mesh.get_array(), mask)
        assert axes.get_xlim() == (0, mask.shape[1]) and axes.get_ylim() == (mask.shape[0], 0)
    assert all(f"<!-- {words} -->" in svg(figure, tmp_path) for words in ("Masks", "causal()", "first two"))


def test_mask_grid_begins_a_row_after_so_many_columns():
    one, four = (mask_grid({str(i): np.eye(3) for i in range(n)}, columns=2) for n in (2, 4))
    assert four.get_size_inches()[0] == one.get_size_inches()[0]
    assert four.get_size_inches()[1] > 1.5 * one.get_size_inches()[1]


@pytest.mark.parametrize("masks", [{}, {"a": np.ones(3)}, {"a": np.ones((0, 3))}])
def test_mask_grid_of_what_is_no_matrix(masks):
    with pytest.raises(InputError, match="mask_grid"):
        mask_grid(masks)


def test_arcs_write_both_sides_of_every_head(tmp_path):
    source = svg(arcs(attention(3, 11, 11), SENTENCE, "Layer 2"), tmp_path)
    assert source.count("<!-- animal -->") == 3 * 2 and "<!-- head 3 -->" in source
    source = svg(arcs(attention(1, 1, 2), ["ein"], sources=["a", "an"]), tmp_path)
    assert all(f"<!-- {word} -->" in source for word in ["ein", "a", "an"])


def test_arcs_leave_out_what_is_not_attended():
    lines = arcs(np.eye(4)[None], list("abcd")).axes[0].collections[0]
    assert len(lines.get_segments()) == 4


def test_looks_writes_every_word_in_every_head_and_the_answers_weight(tmp_path):
    weights = attention(2, 3, 11)
    pair = [Look(SENTENCE, 7, weights, 1), (TWIN, 7, attention(2, 3, 11), 5)]
    source = svg(looks(pair, "Where “it” looks"), tmp_path)
    assert source.count("<!-- animal -->") == 2 * (2 * 3 + 1)  # each head, and the sentence above them
    assert source.count("<!-- tired -->") == source.count("<!-- wide -->") == 2 * 3 + 1
    assert f"<!-- {weights[1, 2, 1]:.2f} -->" in source
    assert "<!-- layer 2 -->" in source and "it should find" in source


def test_looks_without_an_answer(tmp_path):
    assert "it should find" not in svg(looks([(["it"], 0, np.ones((1, 1, 1)))]), tmp_path)


def test_long_sentences_are_placed_below_each_other():
    short = looks([(SENTENCE, 7, attention(1, 2, 11))] * 2).get_size_inches()
    long = looks([(SENTENCE * 3, 7, attention(1, 2, 33))] * 2).get_size_inches()
    assert long[1] > 1.5 * short[1]


def test_training_curve_names_lines_where_they_end(tmp_path):
    steps = np.arange(100)
    figure = training_curve(
        steps,
        2 + 4 / (steps + 1),
        steps[::10],
        2.1 + 4 / (steps[::10] + 1),
        {"bz2": 2.11, "xz": 2.1},
        "bits per byte",
    )
    source = svg(figure, tmp_path)
    assert all(
        f"<!-- {word} -->" in source
        for word in ["bz2 2.11", "xz 2.10", "train 2.04", "bits per byte", "step"]
    )
    names = sorted(text.get_position()[1] for text in figure.axes[0].texts)
    assert min(np.diff(names)) > 0.05, "names overlap"


def test_training_curve_is_not_stretched_by_its_beginning():
    values = np.where(np.arange(100) < 5, 1e6, 1.0)
    assert training_curve(np.arange(100), values).axes[0].get_ylim()[1] < 10


@pytest.mark.parametrize("values", [[], [1.0], [np.nan, np.nan], [1.0, np.nan]])
def test_training_curve_of_little(values, tmp_path):
    svg(training_curve(range(len(values)), values, baselines={"xz": 2.0}), tmp_path)


def test_files_are_the_same_every_time(tmp_path):
    def write(name):
        return [
            path.read_bytes()
            for path in save(looks([(SENTENCE, 7, attention(1, 1, 11), 1)]), tmp_path / name)
        ]

    assert write("one") == write("two")


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda: head_grid(attention(1, 1, 3, 4), ["a"] * 3), r"\(1, 1, 3, 4\) and \(3, 3\)"),
        (lambda: head_grid(attention(1, 3, 3), ["a"] * 3), r"\(1, 3, 3\) and \(3, 3\)"),
        (lambda: head_grid(attention(0, 1, 3, 3), ["a"] * 3), r"\(0, 1, 3, 3\)"),
        (lambda: arcs(attention(2, 3, 4), ["a"] * 3), r"\(H, T, S\).*\(2, 3, 4\) and \(3, 3\)"),
        (lambda: looks([(SENTENCE, 7, attention(1, 2, 5))]), r"\(1, 2, 5\) and \(11,\)"),
        (lambda: looks([(SENTENCE, 11, attention(1, 2, 11))]), "query 11"),
        (lambda: looks([(SENTENCE, 7, attention(1, 2, 11), -1)]), "answer -1"),
        (
            lambda: looks([(["a"], 0, np.ones((1, 2, 1))), (["a"], 0, np.ones((2, 2, 1)))]),
            r"\(1, 2\).*\(2, 2\)",
        ),
        (lambda: looks([]), "missing"),
        (lambda: training_curve([1, 2], [1.0]), r"train.*\(2,\) and \(1,\)"),
        (lambda: training_curve([1], [1.0], [1], [1.0, 2.0]), r"eval.*\(1,\) and \(2,\)"),
    ],
)
def test_disagreeing_shapes_are_named(draw, says):
    with pytest.raises(InputError, match=says):
        draw()


def test_over_an_image(tmp_path, refuses):
    weights = np.eye(4).reshape(4, 2, 2)
    figure = over_image(np.eye(8), ["a", "b", "c", "d"], weights, "Looks")
    shown = [axes.get_images() for axes in figure.axes if axes.get_images()]
    assert len(shown) == 4
    np.testing.assert_array_equal(shown[2][1].get_array(), weights[2])
    assert all(path.stat().st_size for path in save(figure, tmp_path / "looks"))
    with refuses("(8, 8)", "(3, 2, 2) for 4 words"):
        over_image(np.eye(8), ["a", "b", "c", "d"], weights[:3])
