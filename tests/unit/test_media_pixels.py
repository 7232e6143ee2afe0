"""What becomes of pixels of any range, and of arrays of any library."""

from __future__ import annotations

import array
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from sidestep.errors import UnsupportedValue
from sidestep.media import Image, arrays, packed, show
from sidestep.media.pixels import channels_last, layout, to_uint8
from sidestep.testing import BlobFolder


def shown(image: Image, folder: Path) -> Any:
    blobs = BlobFolder(folder)
    with Pillow.open(show(packed(image, blobs), blobs)._path) as found:
        return np.asarray(found)


def ramp(*values: float, dtype: Any = np.float32) -> Any:
    return np.array([values], dtype=dtype)


class TestRanges:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            pytest.param(ramp(False, True, dtype=bool), [0, 255], id="bools are black and white"),
            pytest.param(ramp(0, 3, 255, dtype=np.uint8), [0, 3, 255], id="uint8 is as it is"),
            pytest.param(ramp(0, 3, 255, dtype=np.int64), [0, 3, 255], id="so are whole numbers in its range"),
            pytest.param(ramp(0, 257, 65535, dtype=np.uint16), [0, 1, 255], id="16 bits keep the high ones"),
            pytest.param(ramp(0, 200, dtype=np.uint16), [0, 200], id="where there are any"),
            pytest.param(
                ramp(-100, 0, 100, dtype=np.int16), [0, 128, 255], id="other whole numbers are stretched"
            ),
            pytest.param(ramp(0, 0.5, 1), [0, 128, 255], id="floats to 1 are not black"),
            pytest.param(ramp(0, 0.25), [0, 64], id="also those that do not reach it"),
            pytest.param(ramp(0, 3.9, 255), [0, 3, 255], id="floats to 255 are as they are"),
            pytest.param(ramp(-1, 0, 1), [0, 128, 255], id="floats from -1 are stretched"),
            pytest.param(ramp(0, 500, 1000), [0, 128, 255], id="and those beyond 255"),
            pytest.param(ramp(0, 1, np.nan, np.inf, -np.inf), [0, 255, 0, 255, 0], id="NaN is black"),
            pytest.param(ramp(np.nan, np.nan), [0, 0], id="nothing finite is black"),
            pytest.param(ramp(7, 7, dtype=np.int16) - 300, [0, 0], id="nothing but one number is black"),
            pytest.param(ramp(0, 0.5, 1, dtype=np.float16), [0, 128, 255], id="half floats"),
        ],
    )
    def test_become_eight_bits(self, values: Any, expected: list[int]):
        assert [expected] == to_uint8(values).tolist()

    def test_numbers_are_cut_off_where_they_are_not_to_be_stretched(self):
        assert [[0, 0, 255]] == to_uint8(ramp(-5, 0.9, 300), stretch=False).tolist()

    def test_an_image_of_floats_is_seen(self, tmp_path: Path):
        assert [[0, 128, 255]] == shown(Image(ramp(0, 0.5, 1)), tmp_path).tolist()
        assert [[0, 0, 1]] == shown(Image(ramp(0, 0.5, 1), normalize=False), tmp_path).tolist()


class TestShapes:
    @pytest.mark.parametrize(
        ("shape", "first", "expected"),
        [
            ((4, 5), False, (4, 5)),
            ((4, 5, 1), False, (4, 5)),
            ((4, 5, 3), False, (4, 5, 3)),
            ((4, 5, 4), False, (4, 5, 4)),
            ((3, 5, 7), False, (5, 7, 3)),
            ((3, 5, 3), True, (5, 3, 3)),
            ((3, 5, 3), False, (3, 5, 3)),
            ((1, 5, 7), True, (5, 7)),
            ((1, 4, 5, 3), False, (4, 5, 3)),
            ((1, 3, 5, 7), True, (5, 7, 3)),
        ],
    )
    def test_channels_are_found(self, shape: tuple[int, ...], first: bool, expected: tuple[int, ...]):
        assert expected == channels_last(np.zeros(shape), channels_first=first).shape

    @pytest.mark.parametrize("shape", [(4,), (5, 6, 2), (2, 4, 5, 3), (0, 5), (4, 0, 3), ()])
    def test_what_is_no_image_is_said_so(self, shape: tuple[int, ...]):
        with pytest.raises(ValueError, match="an image is HxW"):
            layout(shape, channels_first=False)

    def test_the_worker_refuses_it_already(self, tmp_path: Path):
        with pytest.raises(UnsupportedValue, match="list of images"):
            packed(Image(np.zeros((8, 4, 5, 3))), BlobFolder(tmp_path))


class TestArrays:
    @pytest.mark.parametrize(
        "value",
        [
            np.arange(6, dtype=">i2").reshape(2, 3),
            np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            np.arange(12, dtype=np.uint64).reshape(2, 6)[:, ::2],
            np.array([[True, False]]),
            np.float16([1.5]),
            [[1, 2], [3, 4]],
            [1.5, float("nan")],
            range(5),
            array.array("f", [1, 2]),
            memoryview(b"abc"),
            np.longdouble([0.5]),
            np.array(3.0),
            [np.float32(1), np.float32(2)],
        ],
    )
    def test_are_the_same_again(self, value: Any, tmp_path: Path):
        facts = arrays.taken(value)

        found = arrays.numpy_of(facts | {"data": facts["data"].data}, BlobFolder(tmp_path))

        np.testing.assert_array_equal(np.asarray(value), found)

    def test_of_torch_too_without_numpy(self, tmp_path: Path):
        torch = pytest.importorskip("torch")
        for value in (
            torch.arange(6).reshape(2, 3).T,
            torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
            torch.tensor([0.5], dtype=torch.float16, requires_grad=True),
            torch.tensor([True, False]),
            torch.nn.Parameter(torch.ones(2)),
            torch.zeros(0),
        ):
            facts = arrays.taken(value)
            found = arrays.numpy_of(facts | {"data": facts["data"].data}, BlobFolder(tmp_path))
            np.testing.assert_array_equal(value.detach().float().numpy(), found.astype(np.float32))

    def test_on_a_device_are_refused_and_not_read(self):
        torch = pytest.importorskip("torch")

        with pytest.raises(UnsupportedValue, match=r"'meta'.*tensor\.cpu"):
            arrays.taken(torch.zeros(3, device="meta"))

    @pytest.mark.parametrize(
        ("value", "why"),
        [
            (np.array(["a"]), "neither of numbers"),
            ([[1], [1, 2]], "different lengths"),
            (["a"], "no numbers"),
            (object(), "no array that can be logged"),
            (SimpleNamespace(__cuda_array_interface__={}), "on a device"),
        ],
    )
    def test_of_other_things_are_refused_in_words(self, value: Any, why: str):
        with pytest.raises(UnsupportedValue, match=why):
            arrays.taken(value)

    @pytest.mark.parametrize(
        "facts",
        [
            {"dtype": "O", "shape": [1], "data": b"12345678"},
            {"dtype": "<f4", "shape": [2], "data": b"1234"},
            {"dtype": "<f4", "shape": [-1], "data": b"1234"},
            {"dtype": "<f4", "shape": "1", "data": b"1234"},
            {"dtype": "<U9", "shape": [1], "data": b"1" * 36},
            {"dtype": ["<f4"], "shape": [1], "data": b"1234"},
        ],
    )
    def test_that_are_none_are_bad_content(self, facts: dict[str, Any], tmp_path: Path):
        with pytest.raises(ValueError, match="no array"):
            arrays.numpy_of(facts, BlobFolder(tmp_path))


class TestImagesOfPil:
    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"])
    def test_of_every_mode_are_shown(self, mode: str, tmp_path: Path):
        image = Pillow.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
        image = Pillow.new("LAB", (4, 4)) if mode == "LAB" else image.convert(mode)

        found = shown(Image(image), tmp_path)

        assert (4, 4) == found.shape[:2]
        if mode in ("1", "L", "RGB", "RGBA"):
            np.testing.assert_array_equal(np.asarray(image), found)

    def test_a_palette_keeps_its_colours(self, tmp_path: Path):
        image = Pillow.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).quantize(8)
        blobs = BlobFolder(tmp_path)

        with Pillow.open(show(packed(Image(image), blobs), blobs)._path) as found:
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.asarray(found.convert("RGB")))


def test_the_worker_part_imports_no_library():
    assert "numpy" in sys.modules  # it is this process that has loaded it
    for name in ("arrays", "pixels", "image", "table", "overlays", "value", "cells"):
        source = (Path(arrays.__file__).parent / f"{name}.py").read_text()
        heads = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
        assert not [
            line for line in heads if line.split()[1].partition(".")[0] in ("numpy", "PIL", "torch", "wandb")
        ]
