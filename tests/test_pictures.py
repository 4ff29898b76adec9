"""Pictures: what they hold, that it can be read, and that a user's own style changes nothing."""

import io

import matplotlib
import numpy as np
import pytest
from IPython import display as ipython_display
from matplotlib import image as matplotlib_image
from matplotlib import style

import helpers
from helpers import EpochMetrics

HISTORY = [EpochMetrics(1, 0.9, 0.60, 0.8, 0.62), EpochMetrics(2, 0.5, 0.80, 0.6, 0.75)]
OTHER_HISTORY = [EpochMetrics(1, 0.7, 0.65, 0.7, 0.70), EpochMetrics(2, 0.4, 0.85, 0.5, 0.81)]
HISTORIES = {"SiLU": HISTORY, "ReLU": OTHER_HISTORY}
MATRIX = np.array([[9, 1], [4, 1]])
ROWS = {"SiLU": (0.5, 0.75), "SiLU → ReLU": (0.1, 0.7), "ReLU": (0.8, 0.81)}

RED, GREEN = (255, 0, 0), (0, 255, 0)


def red_over_green():
    """An image whose upper half is red and whose lower half is green."""
    image = np.empty((32, 32, 3), dtype=np.uint8)
    image[:16] = RED
    image[16:] = GREEN
    return image


@helpers.in_default_style
def pixels_of(figure):
    """The drawn figure, float (H, W, 3) from 0 to 1, the uppermost row first."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    file.seek(0)
    return matplotlib_image.imread(file, format="png")[:, :, :3]


def rows_with(pixels, colour):
    """The rows of pixels in which there is this very colour."""
    return np.flatnonzero((pixels == np.array(colour) / 255).all(axis=2).any(axis=1))


def bottom_of(box):
    return box.y0


def title_of(figure):
    return figure._suptitle.get_text()


def draw_images():
    return helpers.plot_images([red_over_green()] * 3, ["a", "b", "c"], "Images")


def draw_histories():
    return helpers.plot_histories(HISTORIES, "Histories")


def draw_confusion():
    return helpers.plot_confusion(MATRIX, ["cat", "dog"], "Confusion")


def draw_statistics():
    return helpers.plot_statistics(ROWS, "Statistics")


ALL_PICTURES = [draw_images, draw_histories, draw_confusion, draw_statistics]


# ---- What the pictures hold ----


def test_each_image_is_upright_with_its_caption_in_a_grid():
    captions = [f"caption {i}" for i in range(10)]
    images = [np.full((32, 32, 3), 20 * i, dtype=np.uint8) for i in range(10)]
    figure = helpers.plot_images(images, captions, "Some images", n_columns=4)

    assert [axis.get_title() for axis in figure.axes] == captions
    for axis, image in zip(figure.axes, images):
        assert np.array_equal(axis.images[0].get_array(), image)
        assert axis.images[0].get_interpolation() == "nearest"
    assert [axis.get_subplotspec().num1 for axis in figure.axes] == list(range(10))
    assert figure.axes[0].get_subplotspec().get_geometry()[:2] == (3, 4)
    assert title_of(figure) == figure.get_label() == "Some images"

    pixels = pixels_of(draw_images())
    assert rows_with(pixels, RED).max() < rows_with(pixels, GREEN).min()


def test_the_curves_hold_the_metrics_with_accuracies_in_percent():
    figure = draw_histories()
    loss, accuracy = figure.axes
    assert title_of(figure) == figure.get_label() == "Histories"
    names = ["SiLU, train", "SiLU, val", "ReLU, train", "ReLU, val"]
    for axis, values in (
            (loss, [[0.9, 0.5], [0.8, 0.6], [0.7, 0.4], [0.7, 0.5]]),
            (accuracy, [[60, 80], [62, 75], [65, 85], [70, 81]])):
        assert [line.get_xdata().tolist() for line in axis.lines] == [[1, 2]] * 4
        assert np.allclose([line.get_ydata() for line in axis.lines], values)
        assert [label.get_text() for label in axis.texts] == names
        for line, label in zip(axis.lines, axis.texts):
            assert label.get_color() == line.get_color()
            assert label.xy == tuple(line.get_xydata()[-1])
        assert axis.get_xlim()[0] < 1 and axis.get_xlim()[1] > 2
    assert "%" in accuracy.get_ylabel() and "%" not in loss.get_ylabel()
    colours = [line.get_color() for line in loss.lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert loss.lines[0].get_linestyle() != loss.lines[1].get_linestyle()


@pytest.mark.parametrize("n_epochs, gap", [(1, 0.0), (2, 0.001), (18, 0.02), (18, 0.3)])
def test_the_labels_at_the_ends_of_the_curves_overlap_with_nothing(n_epochs, gap):
    histories = {}
    for name, shift in (("LeakyReLU", 0.0), ("ReLU", gap)):
        histories[name] = [
            EpochMetrics(i, 2 / i + shift, 1 - 0.5 / i - shift, 2 / i + 3 * shift, 1 - 0.5 / i)
            for i in range(1, n_epochs + 1)]
    figure = helpers.plot_histories(histories, "Title")

    figure.draw_without_rendering()

    loss, accuracy = figure.axes
    for axis, right_end in ((loss, accuracy.get_tightbbox().x0), (accuracy, figure.bbox.x1)):
        boxes = [label.get_window_extent() for label in axis.texts]
        boxes.sort(key=bottom_of)
        assert len(boxes) == 4
        for lower, upper in zip(boxes, boxes[1:]):
            assert lower.y1 <= upper.y0
        for box in boxes:
            assert box.x1 <= right_end
            assert box.y1 <= figure.bbox.y1


def test_a_confusion_matrix_holds_counts_and_shares_of_the_rows():
    figure = draw_confusion()
    (axis,) = figure.axes
    assert title_of(figure) == figure.get_label() == "Confusion"
    assert {text.get_position(): text.get_text() for text in axis.texts} == {
        (0, 0): "9\n90.0%", (1, 0): "1\n10.0%",
        (0, 1): "4\n80.0%", (1, 1): "1\n20.0%"}
    assert [label.get_text() for label in axis.get_xticklabels()] == ["cat", "dog"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["cat", "dog"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted", "true")


def test_a_confusion_matrix_has_its_first_class_on_top_and_shades_mistakes_only():
    figure = draw_confusion()
    (axis,) = figure.axes
    pixels = pixels_of(figure)
    drawn_at = axis.transData.transform  # pixels from the left and from the bottom

    def colour_of(row, column):
        x, y = drawn_at((column - 0.4, row - 0.4))  # a corner of the cell, beside its text
        return pixels[len(pixels) - 1 - int(y), int(x)]

    assert drawn_at((0, 0))[1] > drawn_at((0, 1))[1]
    for cell in ((0, 0), (1, 1)):
        red, green, blue = colour_of(*cell)
        assert red == green == blue  # grey
    strong, weak = colour_of(1, 0), colour_of(0, 1)
    assert strong[0] > strong[2] and weak[0] > weak[2]  # orange
    assert strong[2] < weak[2]  # 80% is stronger than 10%


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_confusion_matrix_without_mistakes_or_with_an_empty_row_can_be_drawn():
    for matrix in (np.diag([3, 4]), np.array([[3, 0], [0, 0]])):
        figure = helpers.plot_confusion(matrix, ["cat", "dog"], "Title")
        assert len(figure.axes[0].texts) == 4
        pixels_of(figure)


def test_a_row_of_the_statistics_is_a_line_from_stored_to_estimated_in_percent():
    figure = draw_statistics()
    (axis,) = figure.axes
    assert title_of(figure) == figure.get_label() == "Statistics"
    assert [label.get_text() for label in axis.get_yticklabels()] == list(ROWS)
    lines = [line for line in axis.lines if len(line.get_xdata()) == 2]
    assert np.allclose([line.get_xdata() for line in lines], [[50, 75], [10, 70], [80, 81]])
    heights = [axis.transData.transform((0, line.get_ydata()[0]))[1] for line in lines]
    assert heights == sorted(heights, reverse=True)  # in the table's order, from the top
    assert "%" in axis.get_xlabel()
    rings = [line for line in axis.lines if len(line.get_xdata()) == 1]
    empty = [ring.get_xdata()[0] for ring in rings if ring.get_markerfacecolor() == "white"]
    assert np.allclose(empty, [50, 10, 80])
    legend = [text.get_text() for text in axis.get_legend().get_texts()]
    assert legend == ["as stored", "estimated again"]


# ---- A user's own style, and showing ----


USERS_STYLE = ["dark_background", {
    "image.origin": "lower", "figure.constrained_layout.use": True, "axes.grid": True,
    "font.size": 20, "savefig.facecolor": "black"}]


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("draw", ALL_PICTURES)
def test_a_users_own_style_changes_no_pixel_and_warns_of_nothing(draw):
    expected = pixels_of(draw())
    with style.context(USERS_STYLE):
        before = dict(matplotlib.rcParams)
        found = pixels_of(draw())
        assert dict(matplotlib.rcParams) == before
    assert found.shape == expected.shape
    assert np.array_equal(found, expected)
    assert expected.mean() > 0.5  # on a white ground


def test_outside_a_notebook_a_figure_is_its_title(capsys):
    helpers.show(draw_confusion())
    assert capsys.readouterr().out == "Confusion\n"


def test_in_a_notebook_a_figure_is_a_png_in_its_own_style_with_its_title_as_text(monkeypatch):
    displayed = []

    def display(data, raw, metadata):
        displayed.append((data, raw, metadata))

    def in_notebook():
        return True

    monkeypatch.setattr(helpers, "in_notebook", in_notebook)
    monkeypatch.setattr(ipython_display, "display", display)
    figure = draw_confusion()
    with style.context(USERS_STYLE):
        helpers.show(figure)

    ((data, raw, metadata),) = displayed
    assert raw is True
    assert data["text/plain"] == metadata["image/png"]["alt"] == "Confusion"
    shown = matplotlib_image.imread(io.BytesIO(data["image/png"]), format="png")[:, :, :3]
    assert np.array_equal(shown, pixels_of(draw_confusion()))
