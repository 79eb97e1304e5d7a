import time
import warnings
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from attnlab.errors import InputError
from attnlab.inspect.curves import STYLES, training_curve
from attnlab.inspect.figures import PAGE_WIDTH, arcs, head_grid, image_overlay, mask_grid, save
from attnlab.inspect.layout import legible
from attnlab.inspect.query_attention import QueryAttention, query_attention

SENTENCE = ["The", "animal", "didn't", "cross", "the", "street", "because", "it", "was", "too", "tired"]
TWIN = [*SENTENCE[:-1], "wide"]


@pytest.fixture(autouse=True)
def no_warnings():
    """Turn warnings into errors: matplotlib warns about missing glyphs and bad layouts."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def attention(*shape):
    weights = np.random.default_rng(0).exponential(size=shape)
    return weights / weights.sum(-1, keepdims=True)


def svg(figure, tmp_path):
    """Save a figure, check both files and return the SVG source, with each text as a comment."""
    png, vector = save(figure, tmp_path / "deep" / "er" / "figure.v1")
    assert (png.name, vector.name) == ("figure.v1.png", "figure.v1.svg")
    with Image.open(png) as image:
        image.verify()
    ElementTree.parse(vector)
    return vector.read_text()


def texts(figure):
    """Return all non-empty texts of a figure."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def maps(figure):
    """Return the axes that contain an image, in drawing order."""
    return [axes for axes in figure.axes if axes.get_images()]


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
def test_legible_removes_space_marks_and_escapes(token, drawn):
    assert legible(token) == drawn


def test_head_grid_labels_heads_and_tokens(tmp_path):
    weights = attention(2, 3, 11, 11).astype(np.float32)
    figure = head_grid(weights, SENTENCE, "Who attends to whom")
    source = svg(figure, tmp_path)
    named = ["layer 1", "layer 2", "head 1", "head 2", "head 3", "query", "key", "Who attends to whom"]
    assert all(f"<!-- {word} -->" in source for word in [*SENTENCE, *named])
    for axes, drawn in zip(maps(figure), weights.reshape(6, 11, 11), strict=True):
        np.testing.assert_array_equal(axes.get_images()[0].get_array(), drawn)


def test_head_grid_places_layers_in_rows_and_heads_in_columns():
    boxes = [axes.get_position() for axes in maps(head_grid(attention(2, 3, 11, 11), SENTENCE))]
    rows = np.array([box.y0 for box in boxes]).reshape(2, 3)
    columns = np.array([box.x0 for box in boxes]).reshape(2, 3)
    assert np.ptp(rows, axis=1).max() < 1e-9 and np.ptp(columns, axis=0).max() < 1e-9
    assert (rows[0] - boxes[0].height > rows[1]).all()
    assert (columns[:, 1:] > columns[:, :-1] + boxes[0].width).all()


def test_head_grid_of_many_heads_fits_page_without_overlapping_labels():
    figure = head_grid(attention(4, 8, 24, 24), SENTENCE * 2 + ["a", "b"])
    assert figure.get_size_inches()[0] <= PAGE_WIDTH
    axes = maps(figure)[0]
    shown = [tick for tick in axes.yaxis.get_major_ticks() if tick.label1.get_text()]
    inches = axes.get_position().height * figure.get_size_inches()[1]
    assert 1 < len(shown) < 24 and inches / len(shown) > 7 / 72
    assert [tick.label1.get_text() for tick in shown] == (SENTENCE * 2 + ["a", "b"])[:: 24 // len(shown)]
    wide = maps(head_grid(attention(1, 8, 24, 24), SENTENCE * 2 + ["a", "b"], max_width=40))[0]
    assert [label.get_text() for label in wide.get_yticklabels()] == SENTENCE * 2 + ["a", "b"]


def test_head_grid_numeric_keys_give_numeric_axis():
    weights, times = attention(1, 1, 2, 100), np.arange(100) / 50
    figure = head_grid(weights, ["forty", "two"], key_tokens=times, key_name="time (s)")
    assert "time (s)" in texts(figure) and "key" not in texts(figure)
    (axes,) = maps(figure)
    assert axes.get_xlim() == pytest.approx((-0.01, 1.99))
    assert axes.get_images()[0].get_extent() == pytest.approx((-0.01, 1.99, 1.5, -0.5))


def test_head_grid_cross_attention_labels_queries_and_keys(tmp_path):
    source = svg(
        head_grid(attention(1, 2, 2, 3), ["ein", "Hund"], key_tokens=["a", "small", "dog"]), tmp_path
    )
    assert all(f"<!-- {word} -->" in source for word in ["ein", "Hund", "a", "small", "dog"])


def test_head_grid_long_key_axis_shows_positions(tmp_path):
    source = svg(head_grid(attention(1, 2, 2, 99), ["forty", "two"], key_tokens=["frame"] * 99), tmp_path)
    assert "<!-- forty -->" in source and "frame" not in source and "<!-- 50 -->" in source


def test_head_grid_single_token_and_head(tmp_path):
    assert "<!-- only -->" in svg(head_grid(np.ones((1, 1, 1, 1)), ["only"]), tmp_path)


def test_head_grid_zero_weights_are_white(tmp_path):
    figure = head_grid(np.zeros((1, 1, 2, 2)), ["a", "b"])
    (image,) = maps(figure)[0].get_images()
    assert image.get_clim() == (0, 1) and not image.get_array().any()
    np.testing.assert_array_equal(image.to_rgba(image.get_array()), np.ones((2, 2, 4)))  # white
    assert "<!-- a -->" in svg(figure, tmp_path)


def test_head_grid_many_tokens_is_fast_and_shows_positions(tmp_path):
    start = time.perf_counter()
    source = svg(head_grid(attention(4, 4, 200, 200), ["word"] * 200), tmp_path)
    assert time.perf_counter() - start < 5
    assert "<!-- word -->" not in source and "<!-- 150 -->" in source


@pytest.mark.parametrize(
    "token", ["$x_1$", "日本", "\n", "\x07", "<&>", "--", "\u0301", "😀", "שלום", "\\frac"]
)
def test_unusual_tokens_are_drawn(token, tmp_path):
    grid = head_grid(attention(1, 1, 2, 2), [token, "x"], title=token)
    svg(grid, tmp_path)
    labels = [label.get_text() for label in maps(grid)[0].get_yticklabels()]
    assert labels == [legible(token), "x"]
    sentence = query_attention([(["a", token], 0, attention(1, 2, 2), 1)])
    svg(sentence, tmp_path)
    assert texts(sentence).count(legible(token)) == 1 + 2  # once above the heads, once in each head
    assert not any(text.get_parse_math() for text in sentence.axes[0].texts)


def test_mask_grid_draws_and_labels_masks(tmp_path):
    masks = {"causal()": np.tril(np.ones((4, 4), bool)), "first two": np.arange(5)[None] < [[2]] * 3}
    figure = mask_grid(masks, "Masks")
    for axes, mask in zip(figure.axes[1:], masks.values(), strict=True):
        (mesh,) = axes.collections
        np.testing.assert_array_equal(mesh.get_array(), mask)
        assert axes.get_xlim() == (0, mask.shape[1]) and axes.get_ylim() == (mask.shape[0], 0)
    assert all(f"<!-- {words} -->" in svg(figure, tmp_path) for words in ("Masks", "causal()", "first two"))


def test_mask_grid_wraps_after_columns():
    one, four = (mask_grid({str(i): np.eye(3) for i in range(n)}, columns=2) for n in (2, 4))
    assert four.get_size_inches()[0] == one.get_size_inches()[0]
    assert four.get_size_inches()[1] > 1.5 * one.get_size_inches()[1]


@pytest.mark.parametrize("masks", [{}, {"a": np.ones(3)}, {"a": np.ones((0, 3))}])
def test_mask_grid_rejects_non_matrices(masks):
    with pytest.raises(InputError, match="mask_grid"):
        mask_grid(masks)


def test_arcs_label_queries_and_keys_of_every_head(tmp_path):
    source = svg(arcs(attention(3, 11, 11), SENTENCE, "Layer 2"), tmp_path)
    assert source.count("<!-- animal -->") == 3 * 2 and "<!-- head 3 -->" in source
    source = svg(arcs(attention(1, 1, 2), ["ein"], key_tokens=["a", "an"]), tmp_path)
    assert all(f"<!-- {word} -->" in source for word in ["ein", "a", "an"])


def test_arcs_omit_small_weights():
    lines = arcs(np.eye(4)[None], list("abcd")).axes[0].collections[0]
    assert len(lines.get_segments()) == 4


def test_query_attention_draws_tokens_per_head_and_answer_weight(tmp_path):
    weights = attention(2, 3, 11)
    pair = [QueryAttention(SENTENCE, 7, weights, 1), (TWIN, 7, attention(2, 3, 11), 5)]
    source = svg(query_attention(pair, "What “it” attends to"), tmp_path)
    assert source.count("<!-- animal -->") == 2 * (2 * 3 + 1)  # each head, and the sentence above the heads
    assert source.count("<!-- tired -->") == source.count("<!-- wide -->") == 2 * 3 + 1
    assert f"<!-- {weights[1, 2, 1]:.2f} -->" in source
    assert "<!-- layer 2 -->" in source and "it should attend to" in source


def test_query_attention_without_answer(tmp_path):
    assert "it should attend to" not in svg(query_attention([(["it"], 0, np.ones((1, 1, 1)))]), tmp_path)


def test_query_attention_stacks_long_sentences():
    short = query_attention([(SENTENCE, 7, attention(1, 2, 11))] * 2).get_size_inches()
    long = query_attention([(SENTENCE * 3, 7, attention(1, 2, 33))] * 2).get_size_inches()
    assert long[1] > 1.5 * short[1]


def test_training_curve_labels_line_ends_without_overlap(tmp_path):
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
    assert min(np.diff(names)) > 0.05, "labels overlap"


def test_training_curve_y_axis_ignores_warmup():
    values = np.where(np.arange(100) < 5, 1e6, 1.0)
    assert training_curve(np.arange(100), values).axes[0].get_ylim()[1] < 10


@pytest.mark.parametrize("values", [[], [1.0], [np.nan, np.nan], [1.0, np.nan]])
def test_training_curve_of_few_or_nan_values(values, tmp_path):
    figure = training_curve(range(len(values)), values, baselines={"xz": 2.0})
    svg(figure, tmp_path)
    last = [f"train {values[-1]:.2f}"] if values and np.isfinite(values[-1]) else []
    assert [text.get_text() for text in figure.axes[0].texts] == [*last, "xz 2.00"]
    colour = STYLES["train"]["color"]
    drawn = [line.get_ydata() for line in figure.axes[0].lines if line.get_color() == colour]
    drawn = [y for y in drawn if len(y) == len(values)]  # without the leader line of the label
    np.testing.assert_array_equal(drawn, [values] if values else [])
    assert np.isfinite(figure.axes[0].get_ylim()).all()


def test_save_is_deterministic(tmp_path):
    def write(name):
        return [
            path.read_bytes()
            for path in save(query_attention([(SENTENCE, 7, attention(1, 1, 11), 1)]), tmp_path / name)
        ]

    assert write("one") == write("two")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: head_grid(attention(1, 1, 3, 4), ["a"] * 3), r"\(1, 1, 3, 4\) and \(3, 3\)"),
        (lambda: head_grid(attention(1, 3, 3), ["a"] * 3), r"\(1, 3, 3\) and \(3, 3\)"),
        (lambda: head_grid(attention(0, 1, 3, 3), ["a"] * 3), r"\(0, 1, 3, 3\)"),
        (lambda: arcs(attention(2, 3, 4), ["a"] * 3), r"\(H, T, S\).*\(2, 3, 4\) and \(3, 3\)"),
        (lambda: query_attention([(SENTENCE, 7, attention(1, 2, 5))]), r"\(1, 2, 5\) and \(11,\)"),
        (lambda: query_attention([(SENTENCE, 11, attention(1, 2, 11))]), "query 11"),
        (lambda: query_attention([(SENTENCE, 7, attention(1, 2, 11), -1)]), "answer -1"),
        (
            lambda: query_attention([(["a"], 0, np.ones((1, 2, 1))), (["a"], 0, np.ones((2, 2, 1)))]),
            r"\(1, 2\).*\(2, 2\)",
        ),
        (lambda: query_attention([]), "missing"),
        (lambda: arcs(SENTENCE, attention(1, 11, 11)), r"weights \(H, T, S\) must be .*numbers, got list"),
        (lambda: head_grid(SENTENCE, attention(1, 1, 11, 11)), r"weights \(L, H, T, S\) must be .*numbers"),
        (lambda: image_overlay(np.eye(8), attention(1, 2, 2), ["a"]), "weights must be .*numbers"),
        (lambda: query_attention([(SENTENCE, 7, SENTENCE)]), "weights must be .*numbers"),
        (lambda: training_curve([1, 2], [1.0]), r"train.*\(2,\) and \(1,\)"),
        (lambda: training_curve([1], [1.0], [1], [1.0, 2.0]), r"eval.*\(1,\) and \(2,\)"),
    ],
)
def test_invalid_arguments_are_reported(draw, message):
    with pytest.raises(InputError, match=message):
        draw()


def test_image_overlay(tmp_path, refuses):
    weights = np.eye(4).reshape(4, 2, 2)
    figure = image_overlay(np.eye(8), ["a", "b", "c", "d"], weights, "Looks")
    shown = [axes.get_images() for axes in figure.axes if axes.get_images()]
    assert len(shown) == 4
    np.testing.assert_array_equal(shown[2][1].get_array(), weights[2])
    assert all(path.read_bytes() for path in save(figure, tmp_path / "looks"))
    assert texts(figure).count("max 1") == 4 and "max of each map" in texts(figure)
    with refuses("(8, 8)", "(3, 2, 2) for 4 names"):
        image_overlay(np.eye(8), ["a", "b", "c", "d"], weights[:3])
