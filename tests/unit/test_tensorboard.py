"""TensorBoard's writer: what it is told becomes metrics, from ours and from those that others' code uses."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.tensorboard as theirs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sidestep
from sidestep.tensorboard import SummaryWriter
from sidestep.tensorboard.writer import Places
from sidestep.testing import Recorder, record


@pytest.fixture
def logged() -> Iterator[Recorder]:
    with record() as recorder:
        yield recorder


class TestWriter:
    def test_a_tag_is_a_name_and_its_step_the_runs(self, logged: Recorder):
        with sidestep.init(), SummaryWriter(places=Places()) as writer:
            writer.add_scalar("train/loss", 0.5, 100)
            writer.add_scalar("train/loss", 0.25, global_step=101, walltime=1.0, new_style=True)

        assert [0.5, 0.25] == logged["train/loss"]
        assert [100, 101] == logged.steps("train/loss")

    def test_tags_may_come_in_any_order_of_steps(self, logged: Recorder):
        with sidestep.init():
            writer = SummaryWriter(places=Places())
            writer.add_scalar("train/loss", 0.5, 1000)
            writer.add_scalar("val/accuracy", 0.7, 1)
            writer.add_scalar("val/accuracy", 0.8, 2)
            writer.add_scalar("train/loss", 0.4, 1001)

        assert ([1, 2], [1000, 1001]) == (logged.steps("val/accuracy"), logged.steps("train/loss"))

    def test_without_a_step_it_is_counted(self, logged: Recorder):
        with sidestep.init():
            for value in (1.0, 2.0):
                SummaryWriter(places=Places()).add_scalar("loss", value)

        assert [0, 1] == logged.steps("loss")

    def test_it_begins_a_run_where_there_is_none(self, logged: Recorder):
        SummaryWriter(places=Places()).add_scalar("loss", 1.0, 0)

        assert [1.0] == logged["loss"]

    def test_scalars_text_and_hparams(self, logged: Recorder):
        with sidestep.init():
            writer = SummaryWriter("runs/a", places=Places())
            writer.add_scalars("loss", {"train": 0.5, "val": 0.6}, 3)
            writer.add_text("note", "fine", 3)
            writer.add_hparams({"lr": 0.1}, {"hparam/accuracy": 0.9}, global_step=4)

        assert [0.5, 0.6, "fine"] == [logged[name][0] for name in ("loss/train", "loss/val", "note")]
        assert ({"lr": 0.1}, [4]) == (logged.config, logged.steps("hparam/accuracy"))

    def test_other_directories_names_come_before_their_tags(self, logged: Recorder):
        places = Places()
        with sidestep.init():
            for directory in ("runs/train", "runs/val", "runs/train/deep", "elsewhere/x"):
                SummaryWriter(directory, places=places).add_scalar("loss", 1.0, 0)

        assert ["deep/loss", "loss", "val/loss", "x/loss"] == logged.names

    def test_what_has_no_form_is_said_and_counted(self, caplog: pytest.LogCaptureFixture):
        with record(strict=False), sidestep.init() as run:
            writer = SummaryWriter(places=Places())
            writer.add_graph(object())
            writer.add_graph(object())
            writer.flush()
            writer.close()

            assert 2 == run.stats().values_refused
        assert 1 == caplog.text.count("add_graph() has no form")

    def test_what_is_no_value_is_left_out_and_raises_nothing(self):
        with record(strict=False), sidestep.init() as run:
            writer = SummaryWriter(places=Places())
            writer.add_scalars("loss", 7, 3)  # type: ignore[arg-type]
            writer.add_image("image", object(), 3)
            writer.add_images("images", 7, 3, dataformats="NHWX")
            writer.add_video("video", 7, 3)

            assert 4 == run.stats().values_refused


class TestSync:
    def test_the_run_is_told_and_the_files_are_written(self, logged: Recorder, tmp_path: Path):
        with sidestep.init(sync_tensorboard=True), theirs.SummaryWriter(str(tmp_path)) as writer:
            writer.add_scalar("train/loss", 0.5, 7)

        assert ([0.5], [7]) == (logged["train/loss"], logged.steps("train/loss"))
        events = EventAccumulator(str(tmp_path)).Reload()
        assert [(7, 0.5)] == [(it.step, it.value) for it in events.Scalars("train/loss")]

    def test_a_method_that_calls_others_tells_once(self, logged: Recorder, tmp_path: Path):
        """`add_hparams` makes a writer of its own, and calls its `add_scalar`."""
        with sidestep.init(sync_tensorboard=True), theirs.SummaryWriter(str(tmp_path)) as writer:
            writer.add_hparams({"lr": 0.1}, {"accuracy": 0.9}, global_step=1)

        assert (["accuracy"], [0.9]) == (logged.names, logged["accuracy"])

    def test_after_finish_everything_is_as_before(self, logged: Recorder, tmp_path: Path):
        before = dict(vars(theirs.SummaryWriter)), list(sys.meta_path)
        run = sidestep.init(sync_tensorboard=True)
        assert before[0] != dict(vars(theirs.SummaryWriter))

        run.finish()

        assert before == (dict(vars(theirs.SummaryWriter)), list(sys.meta_path))

    def test_an_error_of_theirs_is_theirs(self, logged: Recorder, tmp_path: Path):
        with sidestep.init(sync_tensorboard=True), theirs.SummaryWriter(str(tmp_path)) as writer:
            with pytest.raises(TypeError):
                writer.add_hparams(7, 8)  # type: ignore[arg-type]
            writer.add_scalar("loss", 1.0, 0)

        assert ["loss"] == logged.names

    def test_one_that_wrapped_ours_since_goes_on(
        self, logged: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        told = []
        run = sidestep.init(sync_tensorboard=True)
        ours = theirs.SummaryWriter.add_scalar

        def wrapper(*args: object, **keywords: object) -> None:
            told.append(args[1])
            ours(*args, **keywords)  # type: ignore[arg-type]

        monkeypatch.setattr(theirs.SummaryWriter, "add_scalar", wrapper)
        run.finish()
        with theirs.SummaryWriter(str(tmp_path)) as writer:
            writer.add_scalar("loss", 1.0, 0)

        assert (["loss"], []) == (told, logged.names)

    @pytest.mark.parametrize(
        "name", [pytest.param("torch.utils.tensorboard", marks=pytest.mark.nightly), "tensorboardX"]
    )
    def test_one_that_is_imported_later_tells_too(self, tmp_path: Path, name: str):
        """Also by its shortest name. tensorboardX is stood in for by a package of the same shape."""
        if name == "tensorboardX":
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("from .writer import SummaryWriter\n")
            (tmp_path / name / "writer.py").write_text(
                "class SummaryWriter:\n"
                "    def __init__(self, logdir): self.logdir = logdir\n"
                "    def add_scalar(self, tag, scalar_value, global_step=None, walltime=None, **more): pass\n"
            )
        script = f"""
            import json, sys
            import sidestep
            from sidestep.testing import record

            with record() as logged, sidestep.init(sync_tensorboard=True):
                assert {name!r} not in sys.modules
                from {name} import SummaryWriter
                SummaryWriter("runs").add_scalar("loss", 0.5, 3)
            json.dump([logged["loss"], logged.steps("loss")], sys.stdout)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, text=True
        )

        assert 0 == done.returncode, done.stderr
        assert [[0.5], [3]] == json.loads(done.stdout)


class TestMedia:
    """Each is what `sidestep`'s own media make of it."""

    def test_each_kind_is_logged_at_its_step(self, logged: Recorder):
        picture = np.zeros((3, 4, 5), np.uint8)
        with sidestep.init() as run:
            writer = SummaryWriter(places=Places())
            writer.add_histogram("histogram", torch.randn(10, 10), 7, bins=16)
            writer.add_image("chw", picture, 7)
            writer.add_image("tensor", torch.zeros(4, 5, 3), 7, dataformats="HWC")
            writer.add_images("images", torch.zeros(2, 3, 4, 5), 7)
            writer.add_audio("audio", torch.zeros(1, 100), 7, sample_rate=8000)
            writer.add_video("video", torch.zeros(1, 2, 3, 16, 16), 7, fps=4)
            assert 0 == run.stats().values_refused

        kinds = {name: logged[name][0] for name in logged.names}
        assert {
            "audio": "audio",
            "chw": "image",
            "histogram": "histogram",
            "tensor": "image",
            "video": "video",
        } == {name: value["_sidestep"] for name, value in kinds.items() if "_sidestep" in value}
        assert {7} == {step for name in logged.names for step in logged.steps(name)}
        assert "images" in kinds
