"""Artifacts in the worker: what is taken and what is refused; and the stage in the daemon that waits for them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sidestep
from sidestep import snapshot
from sidestep.errors import NeedsWandb, UnsupportedValue
from sidestep.media.base import refs_in
from sidestep.media.value import unpacked
from sidestep.testing import Recorder, record
from sidestep.wire import Kind
from sidestepd.artifacts import DELIVERED, SENT, UNCHANGED, Artifacts
from sidestepd.intake.blobs import name_of
from sidestepd.media import Media
from sidestepd.resolve import SessionFacts
from sidestepd.rowlog import RowLog, RowLogReader
from sidestepd.rows import Blob, Logged, Part, Position
from sidestepd.show import Corrupt, Shower
from sidestepd.sinks.jsonl import JsonlSink
from sidestepd.storing import ORPHANED_S, Storing, _checked_path, check

LANE = b"L" * 16
MB = 1024 * 1024


@pytest.fixture
def logged() -> Iterator[Recorder]:
    with record(strict=False) as recorder:
        yield recorder


def contents(recorder: Recorder, number: int = -1) -> dict[str, Any]:
    """What is in an artifact that was logged: its bytes, or what stands there."""
    said = [it.data for it in recorder.records if it.kind is Kind.ARTIFACT][number]
    whole = said["entries"]
    if not isinstance(whole, bytes):
        whole = recorder.blobs[_blob(whole)]
    entries, refs = unpacked(whole)
    found: dict[str, Any] = {}
    for it in entries:
        if "in" in it:
            at = it["in"][1] if len(it["in"]) > 1 else 0
            found[it["path"]] = recorder.blobs[_blob(refs[it["in"][0]])][at : at + it["size"]]
        else:
            found[it["path"]] = it.get("ref") or it["media"]["_sidestep"]
    assert {_blob(ref) for ref in refs} <= {(of, n) for of, a, b in said["blobs"] for n in range(a, b + 1)}
    return found


def _blob(ref: Any) -> tuple[bytes, int]:
    inside = next(refs_in(ref))
    return inside["of"], inside["id"]


class TestWhatIsTaken:
    def test_files_directories_references_and_media(self, logged: Recorder, tmp_path: Path):
        (tmp_path / "d" / "sub").mkdir(parents=True)
        (tmp_path / "d" / "sub" / "b").write_bytes(b"bb")
        (tmp_path / "d" / "empty").write_bytes(b"")
        large = os.urandom(5 * MB)
        (tmp_path / "large").write_bytes(large)
        artifact = sidestep.Artifact("model", "model", metadata={"n": np.float32(0.5), "gone": float("nan")})

        artifact.add_file(tmp_path / "large", name="weights/large")
        artifact.add_dir(tmp_path / "d", name="dir")
        artifact.add_reference("s3://bucket/key")
        artifact.add(sidestep.Table(columns=["a"], data=[[1]]), "table")
        with artifact.new_file("notes.txt") as file:
            file.write("hi")
        with sidestep.init() as run:
            run.log_artifact(artifact, aliases="best", tags=["one two"])

        assert {
            "weights/large": large, "dir/sub/b": b"bb", "dir/empty": b"", "key": "s3://bucket/key",
            "table": "table", "notes.txt": b"hi",
        } == contents(logged)  # fmt: skip
        (facts,) = logged.artifacts
        assert ("model", "model", ["best", "latest"], ["one two"]) == tuple(
            facts[name] for name in ("name", "type", "aliases", "tags")
        )
        assert {"n": 0.5, "gone": None} == facts["metadata"]

    def test_a_small_file_is_what_it_was_when_it_was_added(self, logged: Recorder, tmp_path: Path):
        path = tmp_path / "file"
        path.write_bytes(b"before")
        artifact = sidestep.Artifact("a", "t")
        artifact.add_file(path)
        path.write_bytes(b"after!")

        with sidestep.init() as run:
            run.log_artifact(artifact)

        assert {"file": b"before"} == contents(logged)

    def test_a_clone_is_taken_where_there_are_clones(self, tmp_path: Path):
        path = tmp_path / "file"
        path.write_bytes(b"before")

        def clone(file: int, folder: str) -> int:
            assert str(tmp_path) == folder
            made = os.open(folder, os.O_TMPFILE | os.O_RDWR)
            os.sendfile(made, file, 0, 100)
            return made

        opened = snapshot.take(path, clone=clone)
        with path.open("r+b") as file:
            file.write(b"after!")

        assert opened.file is not None
        assert b"before" == os.pread(opened.file, 100, 0)
        assert snapshot.signature(os.fstat(opened.file)) == opened.was
        opened.close()
        assert ["file"] == [it.name for it in tmp_path.iterdir()]

    def test_where_there_are_none_a_change_is_seen(self, tmp_path: Path):
        path = tmp_path / "file"
        path.write_bytes(b"before")
        opened = snapshot.take(path, clone=lambda *_: None)

        with path.open("r+b") as file:
            file.write(b"after!")
            os.utime(path, ns=(1, 1))

        assert opened.file is not None
        assert snapshot.signature(os.fstat(opened.file)) != opened.was
        opened.close()

    def test_one_that_is_opened_later_must_be_the_same_then(self, tmp_path: Path):
        path = tmp_path / "file"
        path.write_bytes(b"before")
        opened = snapshot.take(path, keep_open=False)
        assert opened.file is None
        (tmp_path / "new").write_bytes(b"before")
        (tmp_path / "new").rename(path)

        with pytest.raises(snapshot.Torn):
            snapshot.reopen(opened)

    def test_save_keeps_paths_and_sends_what_changed_alone(self, logged: Recorder, tmp_path: Path):
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "a.txt").write_text("a")
        with sidestep.init() as run:
            assert [str(tmp_path / "d" / "a.txt")] == run.save(tmp_path / "d" / "*.txt", base_path=tmp_path)
            run.save(tmp_path / "d" / "*.txt", base_path=tmp_path)
            (tmp_path / "d" / "a.txt").write_text("more")
            os.utime(tmp_path / "d" / "a.txt", ns=(1, 1))

        saved = [it for it in logged.records if it.kind is Kind.ARTIFACT]
        assert 2 == len(saved), "once when it was said, and once at the end, since it had changed"
        assert {"d/a.txt": b"more"} == contents(logged)

    def test_what_is_saved_in_the_directory_of_the_run_is_called_as_it_is_there(
        self, logged: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        folder = tmp_path / "time-id"
        (folder / "sub").mkdir(parents=True)
        for name in ("model.pt", "sub/k", "spool.db"):
            (folder / name).write_text(name)
        with sidestep.init() as run:
            monkeypatch.setattr(type(run), "_own_folder", lambda _: str(folder))
            run.save(folder / "model.pt", policy="now")
            run.save("sub/k", policy="now")

            assert [str(folder / "model.pt")] == run.save(folder / "*", policy="now")

        assert [{"model.pt": b"model.pt"}, {"sub/k": b"sub/k"}] == [contents(logged, at) for at in (0, 1)]

    def test_bytes_json_and_code(self, logged: Recorder, tmp_path: Path):
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb" / "not.py").write_text("")
        (tmp_path / "main.py").write_text("x")
        (tmp_path / "data.bin").write_text("y")
        with sidestep.init() as run:
            run.save_artifact("a b/c.bin", b"\0\1")
            run.save_json_artifact("r.json", {"array": np.arange(2)})
            run.log_code(str(tmp_path))

        assert ["a_b_c.bin", "r.json"] == [it["name"] for it in logged.artifacts[:2]]
        assert {"a b/c.bin": b"\0\1"} == contents(logged, 0)
        assert b'"array"' in contents(logged, 1)["r.json"]
        assert {"main.py": b"x"} == contents(logged, 2)
        assert "code" == logged.artifacts[2]["type"]


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: sidestep.Artifact("bad name", "t"), "letters, digits"),
            (lambda: sidestep.Artifact("n" * 129, "t"), "128 at most"),
            (lambda: sidestep.Artifact("n", "wandb-history"), "wandb's own"),
            (lambda: sidestep.Artifact("n", ""), "empty"),
            (lambda: sidestep.Artifact("n", "t", metadata={str(n): n for n in range(101)}), "100 is the most"),
            (lambda: sidestep.Artifact("n", "t", metadata={"n": float("inf")}), "infinity"),
            (lambda: with_(lambda it: it.add_file("/none/there")), "No such file"),
            (lambda: with_(lambda it: it.add_dir("/none/there")), "no directory"),
            (lambda: with_(lambda it: it.add_reference("bucket")), "no address"),
            (lambda: with_(lambda it: it.add(object(), "x")), "takes media"),
            (lambda: with_(lambda it: it.add_reference("s3://b/k", "../out")), "no path"),
        ],
    )
    def test_is_said_by_log_artifact_and_never_raised(self, logged: Recorder, make: Any, words: str, caplog: Any):
        artifact = make()
        with sidestep.init() as run:
            run.log_artifact(artifact)

            assert {"unsupported": 1} == run.stats().dropped

        assert words in caplog.text
        assert [] == logged.artifacts

    @pytest.mark.parametrize(("how", "words"), [({"aliases": ["a:b"]}, "alias"), ({"tags": ["a/b"]}, "tag")])
    def test_so_are_bad_aliases_and_tags(self, how: Any, words: str):
        with record(), sidestep.init() as run, pytest.raises(UnsupportedValue, match=words):
            run.log_artifact(sidestep.Artifact("n", "t"), **how)

    def test_what_is_no_artifact_or_path(self):
        with record(), sidestep.init() as run:
            with pytest.raises(UnsupportedValue, match="takes an Artifact"):
                run.log_artifact(7)
            with pytest.raises(UnsupportedValue, match="live, now or end"):
                run.save("x", policy="never")

    def test_what_is_known_to_the_server_alone_says_so(self):
        with pytest.raises(NeedsWandb, match="Api"):
            sidestep.Artifact("n", "t").download()
        assert not hasattr(sidestep.Artifact("n", "t"), "nonsense")

    def test_nothing_of_it_costs_a_run_that_does_nothing(self, tmp_path: Path):
        (tmp_path / "large").write_bytes(bytes(5 * MB))
        before = len(list(Path("/proc/self/fd").iterdir()))
        run = sidestep.init(mode="disabled", reinit=True)

        run.log_artifact(str(tmp_path / "large"))
        run.save(str(tmp_path / "large"), base_path=tmp_path)
        run.finish()

        assert before == len(list(Path("/proc/self/fd").iterdir()))


def with_(act: Any) -> sidestep.Artifact:
    artifact = sidestep.Artifact("n", "t")
    act(artifact)
    return artifact


def said(number: int, name: str = "model", blobs: int = 1) -> Logged:
    return Logged(
        position=Position(1, number),
        time=0.0,
        session=b"S" * 16,
        id=f"id{number}",
        facts={"name": name, "type": "t"} if name else None,
        entries=b"",
        blobs=((LANE, number * 10, number * 10 + blobs - 1),),
    )


def whole(*numbers: int) -> Any:
    return lambda of: "" if of[1] in numbers else None


class TestTheStage:
    def test_an_artifact_waits_for_all_its_blobs(self):
        stage = Artifacts()
        stage.hear(said(1, blobs=2))

        assert [] == stage.complete(whole(10))
        assert [said(1, blobs=2)] == stage.complete(whole(10, 11))
        assert [] == stage.complete(whole(10, 11)), "each is told once"

    def test_versions_of_a_name_go_one_after_the_other_in_their_order(self):
        stage = Artifacts()
        for number in (1, 2):
            stage.hear(said(number))
        stage.hear(said(3, name="other"))

        assert [said(3, name="other")] == stage.complete(whole(20, 30))
        assert [said(1)] == stage.complete(whole(10, 20, 30))
        assert stage.made("id1", "a")
        assert [] == stage.complete(whole(10, 20, 30)), "the second waits until the run holds the first"
        stage.hold(["id1"])
        assert [said(2)] == stage.complete(whole(10, 20, 30))

    def test_files_of_the_run_wait_for_none_of_them_to_be_held(self):
        stage = Artifacts()
        for number in (1, 2):
            stage.hear(said(number, name=""))
        stage.complete(whole(10, 20))
        stage.made("id1", "a")

        assert [said(2, name="")] == stage.complete(whole(10, 20))

    def test_one_that_is_the_same_as_the_last_is_not_sent(self):
        stage = Artifacts()
        for number, signature in enumerate(("a", "a", "b", "a")):
            stage.hear(said(number))
            stage.complete(lambda _: "")
            sent = stage.made(f"id{number}", signature)
            assert (number != 1) == sent
            stage.hold([f"id{number}"] if sent else [])

        assert {"delivered": 3, "unchanged": 1, "left_out": {}, "waiting": 0} == stage.ledger()

    def test_one_that_will_never_be_whole_is_left_out_and_those_behind_it_go(self):
        stage = Artifacts()
        for number in (1, 2):
            stage.hear(said(number))

        assert [] == stage.complete(lambda of: "torn" if of[1] == 10 else None)
        assert [said(1)] == stage.take_done()
        assert [said(2)] == stage.complete(whole(20))
        assert {"torn": 1} == stage.ledger()["left_out"]

    def test_what_is_not_whole_at_the_end_is_lost_and_what_is_waits_for_its_turn(self):
        stage = Artifacts()
        for number in (1, 2, 3):
            stage.hear(said(number))
        stage.complete(whole(10, 20))

        stage.flush(whole(10, 20))

        assert {"lost": 1} == stage.ledger()["left_out"]
        assert 2 == stage.waiting

    def test_a_life_that_follows_sends_again_what_the_run_lacks_and_nothing_else(self):
        first = Artifacts()
        for number in (1, 2, 3):
            first.hear(said(number, name=str(number)))
        first.complete(lambda _: "")
        first.made("id1", "a")
        first.made("id2", "b")
        fates = first.take_fates()
        state = first.state()

        second = Artifacts(fates=fates)
        second.hold(["id1"])
        second.restore(state)
        second.hear(said(2, name="2"))

        assert [said(2, name="2"), said(3, name="3")] == second.complete(lambda _: "")
        assert second.made("id2", "b"), "it was sent, and the run does not hold it"
        assert [said(1, name="1")] == second.take_done()
        assert {"id1": DELIVERED, "id2": SENT} == {id_: fate for id_, _, _, fate in second.take_fates()}

    def test_fates_are_kept_in_their_order_and_outlive_damage(self, tmp_path: Path):
        rowlog = RowLog(tmp_path / "delivery.db")
        rowlog.settle(artifacts=[("b", "model", "x", SENT), ("a", "model", "y", SENT)])
        rowlog.settle(artifacts=[("b", "", "", DELIVERED), ("c", "model", "y", UNCHANGED)])
        rowlog.close()

        found = RowLog(tmp_path / "delivery.db").artifacts()

        assert [("b", "model", "x", DELIVERED), ("a", "model", "y", SENT), ("c", "model", "y", UNCHANGED)] == found
        assert 0 == RowLogReader(tmp_path / "delivery.db").cursor()


class TestOrphans:
    """Bytes whose record never came."""

    @pytest.fixture
    def storing(self, tmp_path: Path) -> Iterator[Storing]:
        (tmp_path / "blobs").mkdir()
        rowlog = RowLog(tmp_path / "delivery.db")
        shower = Shower(tmp_path / "blobs", lambda *_: None, threads=1)
        media = Media(shower, patience=1.0, capacity=10, beat=lambda: None, told={})
        yield Storing(tmp_path / "artifacts", tmp_path / "blobs", JsonlSink(), rowlog, media)
        shower.close()

    @staticmethod
    def sessions(worker: str | None, lane: str | None) -> dict[bytes, SessionFacts]:
        return {
            b"W" * 16: SessionFacts(ended=worker, role="worker"),
            LANE: SessionFacts(ended=lane, role="blobs", beside=(b"W" * 16).hex()),
        }

    def left(self, storing: Storing, tmp_path: Path) -> list[str]:
        storing.clean()
        storing._media.clean()
        return sorted(path.name for path in (tmp_path / "blobs").glob("*-*"))

    def test_go_when_their_worker_and_what_sent_them_have_said_their_last_word(
        self, storing: Storing, tmp_path: Path
    ):
        (tmp_path / "blobs" / name_of(LANE, 1)).write_bytes(b"x")
        for worker, lane in ((None, None), ("bye", None), (None, "bye")):
            storing.forget_orphans(self.sessions(worker, lane), 0.0)
            assert [name_of(LANE, 1)] == self.left(storing, tmp_path)

        storing.forget_orphans(self.sessions("bye", "bye"), 0.0)

        assert [] == self.left(storing, tmp_path)

    def test_stay_for_a_while_where_one_said_nothing(self, storing: Storing, tmp_path: Path):
        (tmp_path / "blobs" / name_of(LANE, 1)).write_bytes(b"x")
        storing.forget_orphans(self.sessions("lease", "lease"), 0.0)
        assert [name_of(LANE, 1)] == self.left(storing, tmp_path)

        storing.forget_orphans(self.sessions("lease", "lease"), ORPHANED_S + 1)

        assert [] == self.left(storing, tmp_path)

    def test_what_an_artifact_needs_is_no_orphan(self, storing: Storing, tmp_path: Path):
        for number in (10, 11):
            (tmp_path / "blobs" / name_of(LANE, number)).write_bytes(b"x")
        storing.hear(said(1))

        storing.forget_orphans(self.sessions("bye", "bye"), 0.0)

        assert [name_of(LANE, 10)] == self.left(storing, tmp_path)

    def test_what_a_call_shows_that_waits_for_another_rank_is_none(self, storing: Storing, tmp_path: Path):
        for number in (10, 11):
            (tmp_path / "blobs" / name_of(LANE, number)).write_bytes(b"x")
        image = {"_sidestep": "image", "facts": {"file": {"_blob": {"of": LANE, "id": 10, "size": 1}}}}
        waits = Part(
            position=Position(1, 1), session=b"W" * 16, rank=1, axis="global_step", step=1, time=0.0,
            values={"image": image},
        )  # fmt: skip

        storing.forget_orphans(self.sessions("bye", "bye"), 0.0, waiting=[waits])

        assert [name_of(LANE, 10)] == self.left(storing, tmp_path)

    def test_what_a_worker_gave_up_goes_at_once(self, storing: Storing, tmp_path: Path):
        (tmp_path / "blobs" / name_of(LANE, 1)).write_bytes(b"x")

        storing._media.store(Blob(session=LANE, number=1, failed="dropped"))

        assert [] == self.left(storing, tmp_path)


class TestChecking:
    def test_bytes_are_what_was_sent_or_nothing(self, tmp_path: Path):
        path, content = tmp_path / "blob", os.urandom(1000)
        path.write_bytes(content)
        crc, sha256 = zlib.crc32(content), hashlib.sha256(content).digest()

        assert sha256.hex() == check(path, 1000, crc, sha256)
        for wrong in ((999, crc, sha256), (1000, crc + 1, sha256), (1000, crc, bytes(32))):
            with pytest.raises(Corrupt):
                check(path, *wrong)

    @pytest.mark.parametrize("path", ["", "/etc/passwd", "a/../../b", "a\\b", "a\nb", None, 3])
    def test_no_path_leads_out(self, path: Any):
        with pytest.raises(ValueError, match="no path"):
            _checked_path(path, in_run=False)

    @pytest.mark.parametrize("path", ["config.yaml", "output.log", "wandb-summary.json", "media/images/x.png"])
    def test_no_file_of_wandbs_is_written_over(self, path: str):
        assert path == _checked_path(path, in_run=False)
        with pytest.raises(ValueError, match="wandb's own"):
            _checked_path(path, in_run=True)


def test_an_import_costs_nothing_of_it():
    code = "import sys, sidestep; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    ).stdout.split()

    assert {"sidestep", "sidestep.outputs"} <= set(loaded)
    assert {"sidestep.artifacts", "sidestep.courier", "tempfile", "glob"}.isdisjoint(loaded)
