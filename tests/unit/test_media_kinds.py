"""What each kind does beyond what wandb does: mistakes, tables that grow, encoding."""

from __future__ import annotations

import io
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

import sidestep
from sidestep import _current, media, plot
from sidestep.errors import UnsupportedValue
from sidestep.media import Audio, Histogram, Html, Image, Molecule, Object3D, Plotly, Table, Video, packed, show
from sidestep.media.base import refs_in
from sidestep.media.implicit import media_of
from sidestep.notices import Notices
from sidestep.testing import BlobFolder, record
from sidestep.wire.plain import is_plain

PIXELS = np.arange(60 * 50 * 3, dtype=np.uint8).reshape(60, 50, 3)


@pytest.fixture
def blobs(tmp_path: Path) -> BlobFolder:
    return BlobFolder(tmp_path)


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> Notices:
    """A process without a run that has said nothing yet."""
    monkeypatch.setattr(_current, "_run", None)
    monkeypatch.setattr(_current, "_notices", fresh := Notices())
    return fresh


class Hostile:
    """Whatever is asked of it raises."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("no")


MISTAKES = {
    "a number": (lambda: Image(5), "no array"),
    "nothing": (lambda: Image(None), "no array"),
    "an address": (lambda: Image("https://example.com/a.png"), "is an address"),
    "no such file": (lambda: Image("/nowhere/a.png"), "can not be read"),
    "another file type": (lambda: Image(PIXELS, file_type="tiff"), "file_type='tiff'"),
    "boxes that are a list": (lambda: Image(PIXELS, boxes=[1]), "dict of groups"),
    "a box without a place": (
        lambda: Image(PIXELS, boxes={"a": {"box_data": [{"class_id": 1}]}}),
        "position with",
    ),
    "half a box": (lambda: Image(PIXELS, boxes={"a": {"box_data": [{"position": {"minX": 1}}]}}), "position with"),
    "a class that is no number": (
        lambda: Image(PIXELS, masks={"a": {"mask_data": PIXELS[..., 0], "class_labels": {"x": "y"}}}),
        "no class id",
    ),
    "a mask of colours": (lambda: Image(PIXELS, masks={"a": {"mask_data": PIXELS}}), "array HxW"),
    "classes without names": (lambda: Image(PIXELS, classes=[{"id": 1}]), "id and name"),
    "a histogram of nothing": (Histogram, "of a sequence"),
    "too many bins": (lambda: Histogram([1, 2], num_bins=513), "512 bins"),
    "too many counts": (lambda: Histogram(np_histogram=([1] * 600, list(range(601)))), "600 bins"),
    "counts without edges": (lambda: Histogram(np_histogram=([1, 2], [0, 1])), "3 edges"),
    "a count that is none": (lambda: Histogram(np_histogram=([float("nan")], [0, 1])), "finite"),
    "a histogram of words": (lambda: Histogram(["a", "b"]), "no numbers"),
    "a sound without a rate": (lambda: Audio(np.zeros(10)), "sample_rate= is needed"),
    "half a sample": (lambda: Audio(np.zeros(10), sample_rate=0.5), "whole number"),
    "a cube of samples": (lambda: Audio(np.zeros((2, 2, 2)), sample_rate=8), "shape N or NxC"),
    "a still": (lambda: Video(PIXELS), "TxCxHxW"),
    "a film of text": (lambda: Video("a.txt"), "is no video"),
    "bytes of what": (lambda: Video(b"123"), "format= is needed"),
    "a film of no format": (lambda: Video(PIXELS[None], format="avi"), "format='avi'"),
    "a page of numbers": (lambda: Html(5), "HTML is text"),
    "points in a plane": (lambda: Object3D(np.zeros((4, 2))), "Nx3"),
    "a scene of another type": (lambda: Object3D({"type": "x"}), "lidar/beta"),
    "a box without corners": (
        lambda: Object3D.from_point_cloud([], [sidestep.box3d(center=1, size=2, orientation=3, color=4)]),
        "8 corners",
    ),
    "a thing of no format": (lambda: Object3D("a.txt"), "no thing in space"),
    "a stream of what": (lambda: Object3D(io.StringIO("v")), "file_type=None"),
    "a molecule of no format": (lambda: Molecule("a.txt"), "no molecule"),
    "a molecule of rdkit": (lambda: Molecule.from_smiles("CCO"), r"rdkit\.Chem\.MolToPDBFile"),
    "a figure of nobody": (lambda: Plotly(3), "no figure"),
    "a table of text": (lambda: Table(data="abc"), "list of rows"),
    "rows of numbers": (lambda: Table(columns=["a"], data=[1, 2]), "list of values"),
    "columns of text": (lambda: Table(columns="ab"), "list of names"),
    "a mode of no table": (lambda: Table(log_mode="SOMETIMES"), "log_mode='SOMETIMES'"),
    "a chart of a list": (lambda: plot.bar([1], "a", "b"), "sidestep.Table"),
    "lines that do not match": (lambda: plot.line_series([[1], [2]], [[1]]), "do not go together"),
    "a matrix of nothing": (lambda: plot.confusion_matrix(y_true=[1]), "preds and y_true or of probs"),
    "a matrix of both": (lambda: plot.confusion_matrix([[1]], [1], [1]), "preds and y_true or of probs"),
    "hostile": (lambda: Image(Hostile()), "RuntimeError"),
    "hostile rows": (lambda: Table(data=Hostile()), "RuntimeError"),
}


class TestMistakes:
    @pytest.mark.parametrize("mistake", MISTAKES)
    def test_are_told_when_the_value_is_logged_and_not_before(self, mistake: str, blobs: BlobFolder):
        """A constructor that raises would end a training."""
        make, why = MISTAKES[mistake]

        value = make()

        with pytest.raises(UnsupportedValue, match=why):
            packed(value, blobs)

    @pytest.mark.parametrize("kind", media.KINDS)
    @pytest.mark.parametrize("facts", [{}, {"file": 5}, {"rows": b"x", "columns": []}, {"pixels": {"data": b""}}])
    def test_of_whoever_sends_are_bad_content(self, kind: str, facts: dict[str, Any], blobs: BlobFolder):
        """What comes over the wire may be anything, and costs its value alone."""
        with pytest.raises(ValueError, match=r"."):
            show({"_sidestep": kind, "facts": facts}, blobs)

    def test_of_an_image_are_those_of_the_image_made_of_it(self, blobs: BlobFolder):
        with pytest.raises(UnsupportedValue, match="no array"):
            packed(Image(Image(None)), blobs)


class TestPacking:
    def test_a_small_value_needs_no_blob(self, blobs: BlobFolder):
        for value in (Image(PIXELS[:8, :8]), Histogram(range(100)), Html("text"), Table(data=[[1, 2, 3]])):
            assert [] == list(refs_in(packed(value, blobs)))

    def test_all_kinds_are_plain(self, blobs: BlobFolder):
        for value in (
            Image(PIXELS, boxes={"a": {"box_data": []}}),
            Audio(np.zeros(9000), 8),
            Table(data=[[1, 2, 3]]),
        ):
            assert is_plain(packed(value, blobs))

    def test_a_file_is_read_before_it_is_written_again(self, tmp_path: Path, blobs: BlobFolder):
        path = tmp_path / "again.png"
        Pillow.fromarray(PIXELS).save(path)
        value = packed(Image(path), blobs)

        Pillow.fromarray(PIXELS[::-1]).save(path)

        with Pillow.open(show(value, blobs)._path) as found:
            np.testing.assert_array_equal(PIXELS, np.asarray(found))


class TestImplicitly:
    def test_what_draws_is_an_image(self):
        figures = pytest.importorskip("matplotlib.figure")
        figure = figures.Figure()

        assert isinstance(media_of(figure), Image)
        assert isinstance(media_of(figure.subplots()), Image)
        assert isinstance(media_of(Pillow.fromarray(PIXELS)), Image)

    def test_pyplot_stands_for_its_current_figure(self, blobs: BlobFolder):
        pytest.importorskip("matplotlib").use("Agg")
        from matplotlib import pyplot

        pyplot.figure(figsize=(1, 1))
        value = media_of(pyplot)
        pyplot.close("all")

        assert isinstance(value, Image)
        assert (100, 100) == (show(packed(value, blobs), blobs)._width, show(packed(value, blobs), blobs)._height)

    def test_other_values_are_not(self):
        for value in (1, "a", PIXELS, [1], {"a": 1}, None, sys):
            assert media_of(value) is None


class TestMasks:
    def test_ids_above_127_are_kept(self, blobs: BlobFolder):
        """wandb 0.31 makes 0 of them."""
        mask = np.arange(256, dtype=np.int64).reshape(16, 16)

        shown = show(packed(Image(np.zeros((16, 16)), masks={"m": {"mask_data": mask}}), blobs), blobs)

        with Pillow.open(shown._masks["m"]._path) as found:
            np.testing.assert_array_equal(mask, np.asarray(found))
        assert "class_255" == shown._masks["m"]._val["class_labels"][255]

    def test_ids_beyond_255_are_bad(self, blobs: BlobFolder):
        value = packed(Image(np.zeros((2, 2)), masks={"m": {"mask_data": np.array([[0, 256]])}}), blobs)

        with pytest.raises(ValueError, match="from 0 to 255"):
            show(value, blobs)


class TestHistograms:
    def test_leave_out_what_is_not_finite_and_say_so(
        self, blobs: BlobFolder, notices: Notices, caplog: pytest.LogCaptureFixture
    ):
        """wandb 0.31 raises."""
        shown = show(packed(Histogram([1.0, float("nan"), 2.0, float("inf")], num_bins=2), blobs), blobs)

        assert [1, 1] == shown.histogram
        assert "2 numbers of a histogram are NaN or infinite" in caplog.text

    def test_are_of_bools_too(self, blobs: BlobFolder):
        assert [1, 2] == show(packed(Histogram(np.array([True, False, True]), num_bins=2), blobs), blobs).histogram


class TestTables:
    def test_a_row_of_a_wrong_length_is_left_out_and_said(
        self, blobs: BlobFolder, notices: Notices, caplog: pytest.LogCaptureFixture
    ):
        table = Table(columns=["a", "b"], data=[[1, 2], [1]])

        table.add_data(1, 2, 3)

        assert [[1, 2]] == show(packed(table, blobs), blobs).data
        assert "values, and 2 columns" in caplog.text

    def test_it_is_counted_and_with_strict_raised(self):
        with record(strict=False):
            run = sidestep.init()
            Table(columns=["a"]).add_data(1, 2, 3)
            assert 1 == run.stats().values_refused

        with record():
            sidestep.init()
            with pytest.raises(UnsupportedValue, match="3 values"):
                Table(columns=["a"]).add_data(1, 2, 3)

    def test_columns_may_be_computed_of_the_others(self, notices: Notices, caplog: pytest.LogCaptureFixture):
        table = Table(columns=["a"], data=[[2], [3]])

        table.add_computed_columns(lambda at, row: {"square": row["a"] ** 2, "at": at})
        table.add_computed_columns(lambda at, row: {"no": row["b"]})

        assert (["a", "square", "at"], [[2, 4, 0], [3, 9, 1]]) == (table.columns, table.data)
        assert [4, 9] == list(table.get_dataframe()["square"])
        assert "KeyError" in caplog.text

    def test_columns_may_mix_types(self, blobs: BlobFolder):
        """wandb 0.31 raises, and the table is lost."""
        table = Table(columns=["a"], data=[[1], ["two"], [None], [3.5]])

        assert [[1], ["two"], [None], [3.5]] == show(packed(table, blobs), blobs).data

    def test_end_at_their_limit(
        self, monkeypatch: pytest.MonkeyPatch, notices: Notices, caplog: pytest.LogCaptureFixture
    ):
        monkeypatch.setattr(Table, "MAX_ARTIFACT_ROWS", 2)

        table = Table(columns=["a"], data=[[1], [2], [3]])

        assert [[1], [2]] == table.data
        assert "at most 2 rows" in caplog.text

    def test_travel_in_two_blobs_whatever_is_in_them(self, blobs: BlobFolder):
        table = Table(columns=["image", "n"], data=[[Image(PIXELS + at), at] for at in range(20)])

        value = packed(table, blobs)

        assert 1 == len(list(refs_in(value)))  # the rows are small enough for the record
        shown = show(value, blobs)
        for at, (image, number) in enumerate(shown.data):
            assert at == number
            with Pillow.open(image._path) as found:
                np.testing.assert_array_equal(PIXELS + at, np.asarray(found))

    def test_in_tables_and_images_in_lists_are_cells_too(self, blobs: BlobFolder):
        inner = Table(columns=["x"], data=[[Image(PIXELS)]])
        table = Table(columns=["t", "l"], data=[[inner, [Image(PIXELS), Image(PIXELS)]]])

        ((shown, listed),) = show(packed(table, blobs), blobs).data

        assert ["Image", "Image"] == [type(it).__name__ for it in listed]
        assert "Image" == type(shown.data[0][0]).__name__

    def test_a_cell_that_can_not_be_shown_is_empty_and_said(
        self, blobs: BlobFolder, notices: Notices, caplog: pytest.LogCaptureFixture
    ):
        table = Table(columns=["a", "b"], data=[[object(), 1]])

        assert [[None, 1]] == show(packed(table, blobs), blobs).data
        assert "row 0, column 0" in caplog.text

    def test_an_incremental_one_sends_only_what_is_new(self, blobs: BlobFolder):
        table = Table(columns=["a"], log_mode="INCREMENTAL")
        sent = []
        for at in range(4):
            table.add_data(at)
            table.add_data(at)
            sent.append(show(packed(table, blobs), blobs))

        assert [[[at], [at]] for at in range(4)] == [it.data for it in sent]
        assert [0, 1, 2, 3] == [it._increment_num for it in sent]
        assert [[at] for at in range(4) for _ in range(2)] == table.data

    def test_columns_can_be_added_and_read(self):
        table = Table(columns=["a"], data=[[1], [2]])

        table.add_column("b", [3, 4])

        assert [[1, 3], [2, 4]] == table.data
        assert [3, 4] == table.get_column("b")
        assert [(0, [1, 3]), (1, [2, 4])] == list(table.iterrows())


class TestSounds:
    @pytest.mark.parametrize(
        ("samples", "expected"),
        [
            (np.array([0.0, 0.5, -1.0, 2.0, np.nan]), [[0], [16384], [-32767], [32767], [0]]),
            (np.array([1, -2, 3], dtype=np.int16), [[1], [-2], [3]]),
            (np.array([[1 << 16, -(1 << 16)]], dtype=np.int32), [[1, -1]]),
            (np.array([0, 128, 255], dtype=np.uint8), [[-32768], [0], [32512]]),
            ([0.0, 1.0], [[0], [32767]]),
            (np.stack([np.zeros(40), np.ones(40)]), [[0, 32767]] * 40),
        ],
        ids=["floats", "16 bits", "32 bits", "8 bits", "a list", "channels first"],
    )
    def test_are_written_as_wav(self, samples: Any, expected: list[list[int]], blobs: BlobFolder):
        shown = show(packed(Audio(samples, sample_rate=8000, caption="c"), blobs), blobs)

        with wave.open(shown._path) as file:
            assert (8000, 2, len(expected[0])) == (file.getframerate(), file.getsampwidth(), file.getnchannels())
            found = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
        assert expected == found.tolist()
        assert ("c", 8000, len(expected) / 8000) == (shown._caption, shown._sample_rate, shown._duration)


class TestFilms:
    FRAMES = np.linspace(0, 255, 6, dtype=np.uint8)[:, None, None, None] * np.ones((6, 3, 32, 48), np.uint8)

    @pytest.mark.parametrize("kind", ["mp4", "webm"])
    def test_are_encoded(self, kind: str, blobs: BlobFolder):
        av = pytest.importorskip("av")

        shown = show(packed(Video(self.FRAMES, fps=8, format=kind, caption="c"), blobs), blobs)

        with av.open(shown._path) as container:
            stream = container.streams.video[0]
            found = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(stream)]
            assert 8 == stream.average_rate
        np.testing.assert_allclose(self.FRAMES.mean(axis=(1, 2, 3)), found, atol=4)
        assert (48, 32, "c") == (shown._width, shown._height, shown._caption)

    def test_gif_needs_no_encoder(self, blobs: BlobFolder):
        shown = show(packed(Video(self.FRAMES.transpose(0, 2, 3, 1), format="gif"), blobs), blobs)

        with Pillow.open(shown._path) as found:
            assert (6, (48, 32)) == (found.n_frames, found.size)  # type: ignore[attr-defined]

    def test_without_an_encoder_it_is_said_what_to_install(
        self, blobs: BlobFolder, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setitem(sys.modules, "av", None)

        with pytest.raises(ValueError, match=r"sidestep\[video\]"):
            show(packed(Video(self.FRAMES), blobs), blobs)

    def test_of_odd_sizes_and_floats_and_several_at_once(self, blobs: BlobFolder):
        pytest.importorskip("av")

        shown = show(packed(Video(np.random.default_rng(0).random((3, 2, 1, 15, 17))), blobs), blobs)

        assert (2 * 17 * 2 // 2 * 2, 15) == (shown._width, shown._height)


class TestCharts:
    Y = np.array([0, 1, 1, 0, 2, 2, 1, 0])
    P = np.array([[8, 1, 1], [1, 8, 1], [4, 5, 1], [5, 4, 1], [1, 1, 8], [3, 3, 4], [5, 3, 2], [8, 1, 1]]) / 10

    def test_a_curve_is_what_scikit_learn_computes(self, blobs: BlobFolder):
        shown = show(packed(plot.roc_curve(self.Y, self.P, labels=["a", "b", "c"]), blobs), blobs)

        found = [row[1:] for row in shown.table.data if row[0] == "b"]
        # sklearn.metrics.roc_curve(Y, P[:, 1], pos_label=1), rounded
        assert [[0.0, 0.0], [0.0, 0.333], [0.0, 0.667], [0.2, 0.667], [0.4, 1.0], [1.0, 1.0]] == found

    def test_labels_may_be_words(self, blobs: BlobFolder):
        shown = show(packed(plot.confusion_matrix(y_true=["x", "y", "y"], preds=["x", "x", "y"]), blobs), blobs)

        assert [1.0, 0.0, 1.0, 1.0] == [row[2] for row in shown.table.data]

    def test_one_of_too_many_points_keeps_its_ends(self, blobs: BlobFolder):
        generator = np.random.default_rng(1)
        score = generator.random(40_000)
        shown = show(
            packed(plot.roc_curve(generator.integers(0, 2, 40_000), np.stack([1 - score, score], 1)), blobs), blobs
        )

        rows = [row[1:] for row in shown.table.data if row[0] == 1]
        assert 9_000 < len(shown.table.data) <= 10_000
        assert ([0.0, 0.0], [1.0, 1.0]) == (rows[0], rows[-1])

    @pytest.mark.parametrize(
        ("chart", "why"),
        [
            (plot.roc_curve([0, 1], [[1.0], [0.0]]), "2 classes, and probabilities of 1"),
            (plot.roc_curve([0, 1], [0.5, 0.5]), "probabilities of the shape"),
            (plot.roc_curve([0, 1], [[1.0, float("nan")], [0.0, 1.0]]), "not finite"),
            (plot.confusion_matrix(y_true=[0, 9], preds=[0, 1], class_names=["a", "b"]), "none of the 2 classes"),
            (plot.confusion_matrix(y_true=[0], preds=[0, 1]), "2 predictions do not go with 1"),
        ],
    )
    def test_what_does_not_go_together_is_bad(self, chart: Any, why: str, blobs: BlobFolder):
        with pytest.raises(ValueError, match=why):
            show(packed(chart, blobs), blobs)
