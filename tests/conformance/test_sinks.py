"""What every kind of sink must keep to, in each mode: a new one is picked up by being in MODES.

Each life of a sink is a process of its own, as it is in delivery: it can be killed, and wandb's core with it. They
are forked from one that has imported wandb and done nothing else, as that takes longer than most of the tests.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pytest

from sidestep.media import Histogram, Table, packed
from sidestepd.rows import Row
from sidestepd.sinks import MODES, make_sink, wandb_log
from tests.support import sink_life
from tests.support.daemons import DEADLINE_S, see_gone
from tests.support.waiting import eventually
from tests.support.wandb_server import StandIn

ONLINE, OFFLINE, JSONL = "wandb online", "wandb offline", "jsonl offline"
EVERY_KIND = [f"{kind} {mode}" for kind, modes in MODES.items() for mode in modes]
FILES = [kind for kind in EVERY_KIND if kind != ONLINE]
NURSERY = multiprocessing.get_context("forkserver")
NURSERY.set_forkserver_preload(["tests.support.sink_life"])


class Life:
    """One process with one sink of a kind, in a run directory; its methods are called by name."""

    def __init__(self, kind: str, directory: Path, **environment: str) -> None:
        environment |= server_of(directory).environment if kind == ONLINE else {}
        self._pipe, theirs = NURSERY.Pipe()
        self._process = NURSERY.Process(target=sink_life.live, args=(theirs, kind, directory, environment))
        self._process.start()
        theirs.close()
        self._core: dict[str, Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a method of the sink."""
        self._pipe.send((name, arguments))
        try:
            return self._pipe.recv()
        except EOFError:
            raise AssertionError(f"the sink died in {name}") from None

    def open(self, bookmark: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Open the run, and remember what process of the sink's own must go with it."""
        held: dict[str, Any] = self.call("open", bookmark or {})
        self._core = self.call("about").get("core")
        return held

    def write(self, *steps: int, **values: Any) -> None:
        """Write a row at each step."""
        self.call("write", steps, values)

    def confirm_through(self, step: int) -> tuple[list[int], Mapping[str, Any]]:
        """Ask until a step is confirmed; returns what was, and the last bookmark."""
        steps: list[int] = []
        bookmark: Mapping[str, Any] = {}

        def confirmed() -> bool:
            nonlocal bookmark
            answer = self.call("confirm")
            steps.extend(answer["steps"])
            bookmark = answer["bookmark"]
            return step in steps

        eventually(confirmed, DEADLINE_S, f"step {step} is not confirmed")
        return steps, bookmark

    def close(self, exit_code: int = 0) -> dict[str, Any]:
        """Finish the run; returns what is confirmed by it."""
        self.call("close", exit_code)
        confirmed: dict[str, Any] = self.call("confirm")
        return confirmed

    def kill(self) -> None:
        """SIGKILL, to the sink's own process too, as the keeper does before it starts another."""
        self._process.kill()
        self._process.join()
        if self._core:
            try:
                core = psutil.Process(self._core["pid"])
                core.kill()
                see_gone(core)
            except psutil.NoSuchProcess:
                pass


def server_of(directory: Path) -> StandIn:
    """The W&B server of an online run."""
    return StandIn(directory / "server")


def rows_in(kind: str, directory: Path) -> list[tuple[int, dict[str, Any]]]:
    """What somebody who opens the run finds in it: each row's step and values, over all its files."""
    if kind == OFFLINE:
        segments = wandb_log.segments(directory / "wandb")
        return [(row.step, dict(row.values)) for path in segments for row in wandb_log.history(path)]
    if kind == ONLINE:
        return [(row["_step"], row) for row in server_of(directory).rows("tested")]
    lines = [json.loads(line) for line in (directory / "rows.jsonl").read_bytes().splitlines()]
    return [(line["_step"], line) for line in lines if "_step" in line]


def said_in(kind: str, directory: Path) -> dict[str, Any]:
    """The configuration, summary, definitions and exit code that the run ends with."""
    return {OFFLINE: said_in_segments, ONLINE: said_online, JSONL: said_in_lines}[kind](directory)


def said_in_lines(directory: Path) -> dict[str, Any]:
    said: dict[str, Any] = {"config": {}, "summary": {}, "define": {}, "named": {}, "exit_code": None}
    for line in map(json.loads, (directory / "rows.jsonl").read_bytes().splitlines()):
        said["config"] |= line.get("config", {})
        said["summary"] |= line.get("summary", {})
        said["named"] |= line.get("named", {})
        said["named"].pop("preempted", None)
        if "define_metric" in line:
            said["define"][line["define_metric"]["name"]] = line["define_metric"]["step_metric"]
        said["exit_code"] = line.get("exit_code", said["exit_code"])
    return said


def said_in_segments(directory: Path) -> dict[str, Any]:
    said: dict[str, Any] = {"config": {}, "summary": {}, "define": {}, "exit_code": None}
    for path in wandb_log.segments(directory / "wandb"):
        for record in wandb_log.records(path):
            for item in (*record.config.update, *record.run.config.update):
                said["config"][item.key] = json.loads(item.value_json)
            if record.HasField("run"):
                run = record.run
                said["named"] = {"name": run.display_name, "notes": run.notes, "tags": list(run.tags)}
            for item in record.summary.update:
                said["summary"][item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            if record.HasField("metric"):
                said["define"][record.metric.name] = record.metric.step_metric or None
            if record.HasField("exit"):
                said["exit_code"] = record.exit.exit_code
    return said


def streamed_in(kind: str, directory: Path) -> list[tuple[float, dict[str, float]]]:
    """The stream of system metrics: each sample's time and values, by the sink's own names."""
    if kind.startswith("jsonl"):
        lines = [json.loads(line) for line in (directory / "rows.jsonl").read_bytes().splitlines()]
        return [(line["_timestamp"], line["system"]) for line in lines if "system" in line]
    if kind == ONLINE:
        return [
            (
                line["_timestamp"],
                {name.removeprefix("system."): it for name, it in line.items() if name.startswith("system.")},
            )
            for line in server_of(directory).samples("tested")
        ]
    found = []
    for path in wandb_log.segments(directory / "wandb"):
        for record in wandb_log.records(path):
            if record.HasField("stats"):
                values = {item.key: json.loads(item.value_json) for item in record.stats.item}
                found.append((record.stats.timestamp.seconds + record.stats.timestamp.nanos / 1e9, values))
    return found


def said_online(directory: Path) -> dict[str, Any]:
    server = server_of(directory)
    run = server.run("tested")
    metrics = run["config"]["_wandb"]["m"]
    names = [metric["1"] for metric in metrics]
    return {
        "config": run["config"],
        "summary": server.summary("tested"),
        "define": {it["1"]: names[it["5"] - 1] if "5" in it else None for it in metrics},
        "named": {"name": run.get("displayName"), "notes": run.get("notes"), "tags": run.get("tags")},
        "exit_code": run.get("exitcode"),
    }


def alerts_in(kind: str, directory: Path) -> list[tuple[str, str, str]]:
    """Title, text and level of every alert in the run."""
    if kind == ONLINE:
        return server_of(directory).alerts("tested")
    if kind == OFFLINE:
        segments = wandb_log.segments(directory / "wandb")
        return [alert for path in segments for alert in wandb_log.alerts(path)]
    lines = map(json.loads, (directory / "rows.jsonl").read_bytes().splitlines())
    return [(it["title"], it["text"], it["level"]) for line in lines if (it := line.get("alert"))]


def steps_in(kind: str, directory: Path) -> list[int]:
    return [step for step, _ in rows_in(kind, directory)]


def tear(kind: str, directory: Path) -> None:
    """Cut the newest file in the middle of its last row, as a crash may."""
    path = wandb_log.segments(directory / "wandb")[-1] if kind == OFFLINE else directory / "rows.jsonl"
    os.truncate(path, path.stat().st_size - 5)


@pytest.fixture(params=EVERY_KIND)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def life(kind: str, tmp_path: Path) -> Iterator[Life]:
    with server_of(tmp_path) if kind == ONLINE else nullcontext(), Life(kind, tmp_path) as first:
        yield first


class TestOneLife:
    def test_a_new_run_holds_nothing(self, life: Life):
        assert life.open()["steps"] == []

    def test_rows_are_confirmed_while_the_run_lives_and_each_once(self, life: Life):
        life.open()

        life.write(0, 1, 2)
        first, _ = life.confirm_through(2)
        life.write(3, 7)
        second, _ = life.confirm_through(7)

        assert [[0, 1, 2], [3, 7]] == [first, second]

    def test_samples_keep_their_time_and_make_no_row(self, life: Life, kind: str, tmp_path: Path):
        life.open()
        life.write(0)
        life.call("sample", 1700000000.25, "n1", {"system/gpu0/utilization": 55.5, "system/cpu/percent": 3})
        life.write(1)
        life.close()

        ours = {"system/gpu0/utilization": 55.5, "system/cpu/percent": 3}
        theirs = {"gpu.0.gpu/l:n1": 55.5, "cpu/l:n1": 3}
        assert [(1700000000.25, theirs if kind.startswith("wandb") else ours)] == streamed_in(kind, tmp_path)
        assert [0, 1] == steps_in(kind, tmp_path)

    def test_samples_are_in_wandbs_units(self, tmp_path: Path):
        with Life("wandb offline", tmp_path) as life:
            life.open()
            life.call("sample", 1.0, "n", {"system/memory/available_bytes": 3 << 20})
            life.close()
        assert [(1.0, {"proc.memory.availableMB/l:n": 3})] == streamed_in("wandb offline", tmp_path)

    def test_closing_confirms_the_rest(self, life: Life, kind: str, tmp_path: Path):
        life.open()
        life.write(0, 1)

        confirmed = life.close(exit_code=3)

        assert [0, 1] == confirmed["steps"]
        assert [0, 1] == steps_in(kind, tmp_path)
        assert said_in(kind, tmp_path)["exit_code"] == 3

    def test_a_row_holds_what_it_was_given_and_its_own_time(self, life: Life, kind: str, tmp_path: Path):
        values = {
            "train/loss": 0.25,
            "text": "a\n\u00e4",
            "flag": True,
            "none": None,
            "big": 2**53,
            "list": [1, 2.5],
        }
        life.open()
        life.write(4, **values)

        life.close()

        [(step, found)] = rows_in(kind, tmp_path)
        assert step == 4
        assert {**values, "_step": 4, "_timestamp": 4.5, "loss": 4.0, "global_step": 4}.items() <= found.items()

    def test_alerts_are_in_the_run_in_their_order_also_of_the_same_title(
        self, life: Life, kind: str, tmp_path: Path
    ):
        life.open()
        life.write(0)
        for number, level in enumerate(("INFO", "WARN", "ERROR")):
            life.call("alert", "rank 2 is silent", f"text {number}", level)

        life.close()

        assert [(f"text {number}", level) for number, level in enumerate(("INFO", "WARN", "ERROR"))] == [
            alert[1:] for alert in alerts_in(kind, tmp_path)
        ]
        assert {"rank 2 is silent"} == {alert[0] for alert in alerts_in(kind, tmp_path)}
        assert [0] == steps_in(kind, tmp_path)

    def test_an_alert_that_the_sink_does_not_like_costs_nothing_else(self, life: Life, kind: str, tmp_path: Path):
        life.open()

        life.call("alert", "x" * 500, "", "no such level")
        life.write(0)

        assert [0] == life.close()["steps"]

    def test_what_is_no_number_in_json_does_not_cost_the_row(self, life: Life, kind: str, tmp_path: Path):
        life.open()
        life.write(0, nan=float("nan"), inf=float("inf"), nested={"a": {"b": 1}}, **{"sp ace/@.": 1})

        life.close()

        assert [0] == steps_in(kind, tmp_path)

    def test_config_summary_and_definitions_may_be_said_again(self, life: Life, kind: str, tmp_path: Path):
        """After every crash they are, all of them."""
        life.open()
        for _ in range(2):
            life.call("define", [["eval/loss", "eval/step"], ["global_step", None]])
            life.call("config", {"lr": 0.1, "deep": {"er": 1}})
            life.call("config", {"lr": 0.2})
            life.call("summary", {"best": 1.5})
            life.call("named", {"name": "other", "notes": "longer", "tags": ["t", "best"]})
            life.call("named", {"name": "in the end", "preempted": True})
        life.write(0)

        life.close()

        said = said_in(kind, tmp_path)
        assert {"name": "in the end", "notes": "longer", "tags": ["t", "best"]} == said["named"]
        assert (0.2, 1.5) == (said["config"]["lr"], said["summary"]["best"])
        assert {"eval/loss": "eval/step", "global_step": None}.items() <= said["define"].items()

    def test_tells_of_itself_in_plain_values(self, life: Life):
        life.open()

        about = life.call("about")

        assert isinstance(about, dict)


class TestNextLife:
    """A sink was killed, and the next one opens the same run."""

    def test_is_told_exactly_the_rows_that_the_run_holds(self, life: Life, kind: str, tmp_path: Path):
        """Killed between write and confirm: some of the rows are there, and only the run knows which."""
        life.open()
        life.write(*range(500), filler="x" * 200)
        life.kill()

        with Life(kind, tmp_path) as second:
            held = second.open()["steps"]

            assert list(range(len(held))) == held
            assert held == steps_in(kind, tmp_path)
            second.write(*range(len(held), 505))
            assert set(range(len(held), 505)) == set(second.close()["steps"])
        assert list(range(505)) == steps_in(kind, tmp_path)

    def test_is_told_the_rows_beyond_the_bookmark_only(self, life: Life, kind: str, tmp_path: Path):
        life.open()
        life.write(0, 1, 2)
        _, bookmark = life.confirm_through(2)
        life.write(3, 4)
        life.confirm_through(4)
        life.kill()

        with Life(kind, tmp_path) as second:
            assert [3, 4] == second.open(bookmark)["steps"]

    def test_is_told_the_rows_of_all_lives_together(self, life: Life, kind: str, tmp_path: Path):
        """The newest may hold nothing."""
        life.open()
        life.write(0, 1)
        life.confirm_through(1)
        life.kill()
        with Life(kind, tmp_path) as second:
            second.open()

        with Life(kind, tmp_path) as third:
            assert [0, 1] == third.open()["steps"]

    @pytest.mark.parametrize("kind", FILES)
    def test_is_not_told_of_a_torn_row_and_writes_it_again(self, life: Life, kind: str, tmp_path: Path):
        life.open()
        life.write(0, 1, 2)
        life.confirm_through(2)
        life.kill()
        tear(kind, tmp_path)

        with Life(kind, tmp_path) as second:
            held = second.open()["steps"]
            assert [0, 1] == held
            second.write(2, 3)
            second.close()

        assert [0, 1, 2, 3] == steps_in(kind, tmp_path)

    @pytest.mark.parametrize("kind", FILES)
    def test_is_opened_though_its_bookmark_lies_behind_the_end(self, life: Life, kind: str, tmp_path: Path):
        """A disk that lied about a flush: less is there than was confirmed."""
        life.open()
        life.write(0, 1, 2)
        _, bookmark = life.confirm_through(2)
        life.kill()
        for _ in range(3):
            tear(kind, tmp_path)

        with Life(kind, tmp_path) as second:
            second.open(bookmark)
            second.write(3)
            _, bookmark = second.confirm_through(3)
        with Life(kind, tmp_path) as third:
            assert third.open(bookmark)["steps"] == []
            third.write(4)
            third.close()

        assert {3, 4} <= set(steps_in(kind, tmp_path))

    def test_finishes_a_run_that_was_finished(self, life: Life, kind: str, tmp_path: Path):
        """Killed after the run was finished and before that was written down."""
        life.open()
        life.write(0)
        life.close(exit_code=3)
        life.kill()

        with Life(kind, tmp_path) as second:
            assert [0] == second.open()["steps"]
            second.close(exit_code=3)

        assert [0] == steps_in(kind, tmp_path)
        assert said_in(kind, tmp_path)["exit_code"] == 3


class TestJsonl:
    def test_a_damaged_line_is_no_row_and_no_end(self, tmp_path: Path):
        (tmp_path / "rows.jsonl").write_bytes(b'{"_step": 0}\n\xff\x00nonsense\n[]\n{"_step": 2}\n{"_step": 3')

        with Life(JSONL, tmp_path) as life:
            assert [0, 2] == life.open()["steps"]


class TestWandb:
    def test_a_row_with_a_value_that_wandb_refuses_keeps_the_others(self, tmp_path: Path):
        with Life(OFFLINE, tmp_path) as life:
            life.open()
            refused = life.call("write", [0], {"raw": {"bytes": "ff"}})
            life.close()

        assert ["raw"] == refused

        [(_, values)] = rows_in(OFFLINE, tmp_path)
        assert values["loss"] == 0.0
        assert "raw" not in values

    def test_what_wandb_has_no_form_for_costs_no_media_beside_it_and_is_counted(self, tmp_path: Path):
        page = {"_sidestep": "html", "facts": {"html": b"<p>", "inject": True}}
        table = Table(columns=["n", "h"], data=[[1, Histogram([1.0, 2.0])], [2, Histogram([3, 4, 4], num_bins=3)]])

        with Life(OFFLINE, tmp_path) as life:
            for odd in ([[page]], [page, 3], [{"a": page}], {"a": [1, page]}):
                assert "wandb shows lists of media" in life.call("show_media", odd)
            for good in (page, [page, page], {"a": [page], "b": {"c": page}}, packed(table, None)):
                assert "wandb.sdk.data_types" in life.call("show_media", good)
            life.open()
            assert ("odd", "n" * 300) == life.call("write_media")
            kept = ["checkpoint", "checkpoint/step", "n" * 300, "other/file"]
            assert ["", "unloggable", "unloggable", ""] == [life.call("keep_file", path) for path in kept]
            life.close()

        [(_, values)] = rows_in(OFFLINE, tmp_path)
        assert {"loss": 1, "page._type": "html-file"}.items() <= values.items()
        assert not any(name.startswith("odd") for name in values)

    def test_names_that_wandb_would_take_for_patterns_are_not_defined(self, tmp_path: Path):
        with Life(OFFLINE, tmp_path) as life:
            life.open()
            life.call("define", [["a*", "global_step"], ["b", "global_step"]])
            life.write(0)
            life.close()

        assert {"b": "global_step"} == said_in(OFFLINE, tmp_path)["define"]

    def test_is_not_disturbed_by_a_wandb_around_it(self, tmp_path: Path):
        """A daemon started from a notebook inherits its core, which dies with the notebook."""
        with Life(OFFLINE, tmp_path, WANDB_SERVICE="3-1234-unix-/nowhere/socket") as life:
            life.open()
            life.write(0)
            assert [0] == life.close()["steps"]


class TestOnline:
    def test_no_more_rows_are_given_to_wandb_than_it_may_keep(self, tmp_path: Path):
        """While the server takes none; what was kept is taken when it does."""
        with server_of(tmp_path) as server, Life(ONLINE, tmp_path) as life:
            life.open()
            life.call("set", "most_unconfirmed", 5)
            server.fault("file_stream", "status", status=503)
            life.write(*range(5))

            kept = life.call("try_write", [5], {})

            assert "more slowly than they come" in kept
            assert server.steps("tested") == []
            server.lift()
            eventually(lambda: life.call("try_write", [5], {}) is None, DEADLINE_S)
            life.close()
            assert list(range(6)) == server.steps("tested")

    def test_rows_are_not_confirmed_that_the_server_did_not_take(self, tmp_path: Path):
        with server_of(tmp_path) as server, Life(ONLINE, tmp_path) as life:
            life.open()
            server.fault("file_stream", "status", status=503)
            life.write(0, 1)
            life.call("confirm")  # there is something to ask for
            asked = server.tallies()["graphql/RunResumeStatus"]
            eventually(lambda: server.tallies()["graphql/RunResumeStatus"] > asked + 1, DEADLINE_S)

            assert life.call("confirm")["steps"] == []

            server.lift()
            assert [0, 1] == life.confirm_through(1)[0]

    def test_says_what_keeps_the_server_from_answering(self, tmp_path: Path):
        with server_of(tmp_path) as server, Life(ONLINE, tmp_path) as life:
            life.open()
            life.write(0)
            life.confirm_through(0)
            server.stop()
            life.write(1)

            eventually(lambda: "can not be reached" in (life.call("confirm")["trouble"] or ""), DEADLINE_S)

            server.start()
            life.confirm_through(1)
            assert life.call("confirm")["trouble"] is None


def test_an_unknown_kind_names_the_known():
    with pytest.raises(ValueError, match="wandb, jsonl"):
        make_sink("influx")


def test_rows_are_what_the_tests_above_say():
    """`Row` is built in another process there; a change of its fields shall be noticed here."""
    assert Row(step=0, time=0.5, values={}, places={"global_step": 0}, positions=()).late is False
