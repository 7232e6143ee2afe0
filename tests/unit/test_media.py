"""What every kind of media has in common, by the simplest one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

import sidestep.media
from sidestep.errors import UnsupportedValue
from sidestep.lane import Waiting
from sidestep.media import Image, is_packed, packed, show
from sidestep.media.base import Media, refs_in
from sidestep.testing import BlobFolder, record
from sidestep.wire import MAX_CHUNK_BYTES
from sidestep.wire.plain import is_plain

PIXELS = np.arange(60 * 50 * 3, dtype=np.uint8).reshape(60, 50, 3)


class TestTheTableOfKinds:
    @pytest.mark.parametrize("kind", sidestep.media.KINDS)
    def test_names_the_file_that_has_the_class_and_the_function(self, kind: str):
        module = __import__(sidestep.media.KINDS[kind], fromlist=["show"])

        assert callable(module.show)
        assert kind in {
            value.kind
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, Media) and hasattr(value, "kind")
        }

    def test_a_kind_that_is_not_in_it_is_said_so(self, tmp_path: Path):
        with pytest.raises(ValueError, match="hologram"):
            show({"_sidestep": "hologram", "facts": {}}, BlobFolder(tmp_path))


class TestPacking:
    def test_what_is_packed_is_plain_and_its_bytes_are_elsewhere(self, tmp_path: Path):
        value = packed(Image(PIXELS, caption="five"), BlobFolder(tmp_path))

        assert is_plain(value)
        assert is_packed(value)
        assert [PIXELS.nbytes] == [ref["size"] for ref in refs_in(value)]

    def test_nothing_of_the_callers_is_kept(self, tmp_path: Path):
        mine, blobs = PIXELS.copy(), BlobFolder(tmp_path)
        image = Image(mine)

        mine[:] = 0

        assert PIXELS.tobytes() == blobs.read(packed(image, blobs)["facts"]["pixels"]["data"])

    def test_what_can_not_be_shown_is_refused_in_words(self, tmp_path: Path):
        with pytest.raises(UnsupportedValue, match="1, 3 or 4 channels"):
            packed(Image(PIXELS[..., :2]), BlobFolder(tmp_path))

    def test_a_file_that_is_not_there_is_refused_in_words(self, tmp_path: Path):
        with pytest.raises(UnsupportedValue, match="No such file"):
            packed(Image(tmp_path / "none.png"), BlobFolder(tmp_path))


class TestShowing:
    def test_gives_the_same_pixels(self, tmp_path: Path):
        blobs = BlobFolder(tmp_path)

        image = show(packed(Image(PIXELS, caption="five"), blobs), blobs)

        assert "wandb" in sys.modules
        assert PIXELS.tolist() == np.asarray(Pillow.open(image._path)).tolist()
        assert image._caption == "five"

    def test_content_that_is_no_image_is_bad(self, tmp_path: Path):
        blobs = BlobFolder(tmp_path)

        with pytest.raises(ValueError, match="it is no image"):
            show(packed(Image(b"rubbish" * 1000), blobs), blobs)


class TestLists:
    def test_of_images_those_travel_that_wandb_shows(self):
        with record() as logged:
            run = sidestep.init()
            run.log({"many": [Image(PIXELS[:2, :2]) for _ in range(3000)], "loss": 1.0})

        (row,) = (it.data for it in logged.records if "many" in it.data)
        assert (Image.MAX_ITEMS, 1.0) == (len(row["many"]), row["loss"])


class TestPieces:
    def test_many_small_ones_travel_in_few_records_and_large_ones_in_several(self):
        pieces = (*(bytes([at % 256]) * 200 for at in range(10_000)), bytes(2 * MAX_CHUNK_BYTES + 5), b"", b"end")
        blob = Waiting(number=0, size=sum(map(len, pieces)), pieces=pieces)

        sent = list(blob.read())

        assert b"".join(pieces) == b"".join(sent)
        assert len(sent) <= blob.size // MAX_CHUNK_BYTES + 2
        assert all(0 < len(piece) <= MAX_CHUNK_BYTES for piece in sent)
