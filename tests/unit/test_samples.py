"""Samples behind the spool: out to the stream once, and the newest into the next row."""

from __future__ import annotations

from typing import Any

import pytest

from sidestep.wire import Kind, Record
from sidestepd.rows import Position, Raised, Row, Sample, Sampled
from sidestepd.samples import FRESH_S, Samples, alert_from, first_ranks, sampled_from
from tests.support.builders import row, session_id

UTILIZATION = "system/gpu0/utilization"
GPUS = {"GPU-a": 0, "GPU-b": 1}


def said(
    seq: int, values: dict[str, float], *, time: float | None = None, node: str = "n0", **more: Any
) -> Sampled:
    """What a sampler said, one record after the other, one second apart."""
    return Sampled(
        position=Position(1, seq),
        session=more.pop("session", session_id(9)),
        node=node,
        time=float(seq) if time is None else time,
        values=values,
        **more,
    )


def torch_said(seq: int, allocated: float, *, session: int = 1, **more: Any) -> Sampled:
    device = {"ordinal": 0, "device": "GPU-b", **more}
    return said(seq, {"memory_allocated": allocated}, session=session_id(session), **device)


def values_of(rows: list[Row]) -> list[dict[str, Any]]:
    return [dict(it.values) for it in rows]


class TestTheStream:
    def test_gets_each_sample_with_its_time_and_node(self) -> None:
        samples = Samples()

        samples.hear(said(3, {UTILIZATION: 50.0}, node="n1"))

        assert ([Sample(time=3.0, node="n1", values={UTILIZATION: 50.0})], []) == samples.take()
        assert ([], []) == samples.take()

    def test_is_told_nothing_again_after_a_crash(self) -> None:
        first = Samples()
        first.hear(said(0, {UTILIZATION: 50.0}))
        first.take()

        second = Samples(streamed=first.streamed)
        second.hear(said(0, {UTILIZATION: 50.0}))
        second.alert(Raised(position=Position(1, 0), title="t", text="x"))
        second.hear(said(1, {UTILIZATION: 60.0}))

        assert ([Sample(time=1.0, node="n0", values={UTILIZATION: 60.0})], []) == second.take()

    def test_gets_no_name_that_the_table_has_not(self) -> None:
        samples = Samples()
        samples.hear(said(0, {"system/gpu0/colour": 1, "loss": 2}))
        assert ([], []) == samples.take()

    def test_gets_no_name_that_is_there_under_another(self) -> None:
        """How full the run's disk is, is there by the disk's mount point, as wandb has it; rows have our name."""
        samples = Samples()
        samples.hear(said(0, {"system/disk/percent": 61.0, "system/disk///percent": 61.0}))
        [sample] = samples.take()[0]
        assert {"system/disk///percent": 61.0} == sample.values
        assert [{"a": 1, "system/disk/percent": 61.0}] == values_of(samples.into([row(1, {"a": 1})]))

    def test_hears_of_alerts_where_they_are_from(self) -> None:
        record = Record(kind=Kind.ALERT, time=1.0, step=None, data={"title": "t", "text": "x.", "level": "WARN"})
        texts = [alert_from(record, Position(1, 0), node) for node in ("", "n\x1b7")]
        assert ["x.", "x. On n\\x1b7."] == [it.text for it in texts if it]

    def test_hears_alerts_once(self) -> None:
        samples, alert = Samples(), Raised(position=Position(2, 0), title="t", text="x")
        samples.alert(alert)
        assert ([], [alert]) == samples.take()
        samples.alert(alert)
        assert ([], []) == samples.take()


class TestRows:
    def test_take_the_newest_of_each_name_once(self) -> None:
        samples = Samples()
        samples.hear(said(0, {UTILIZATION: 50.0, "system/cpu/percent": 7.0}))
        samples.hear(said(1, {UTILIZATION: 60.0}))

        rows = samples.into([row(0, {"loss": 1}), row(1, {"loss": 2})])

        assert 60.0 == rows[0].values[UTILIZATION]
        assert 7.0 == rows[0].values["system/cpu/percent"]
        assert 1 == rows[0].values["loss"]
        assert [{"loss": 2}] == values_of(rows[1:])
        assert [{"loss": 3}] == values_of(samples.into([row(2, {"loss": 3})]))

    def test_are_told_of_new_names_once_and_on_no_axis_of_ours(self) -> None:
        samples = Samples()
        for seq in (0, 1):
            samples.hear(said(seq, {UTILIZATION: 50.0, "system/cpu/percent": 1.0}))
            samples.into([row(seq, {"system/cpu/percent": 2.0})])
        defined = samples.take_definitions()
        assert [UTILIZATION, "system/gpu_idle_s"] == [it.name for it in defined]
        assert {None} == {it.step_metric for it in defined}
        assert [] == samples.take_definitions()

    def test_take_the_short_list_only(self) -> None:
        samples = Samples()
        samples.hear(said(0, {"system/gpu0/sm_clock_mhz": 1980.0}))
        assert [{"loss": 1}] == values_of(samples.into([row(0, {"loss": 1})]))

    def test_that_are_late_take_nothing(self) -> None:
        samples = Samples()
        samples.hear(said(0, {UTILIZATION: 50.0}))

        rows = samples.into([row(5, {"loss": 1}, late=True), row(6, {"loss": 2})])

        assert {"loss": 1} == rows[0].values
        assert UTILIZATION in rows[1].values

    def test_keep_what_the_user_logged_under_the_same_name(self) -> None:
        samples = Samples()
        samples.hear(said(0, {UTILIZATION: 50.0}))
        assert 1 == samples.into([row(0, {UTILIZATION: 1})])[0].values[UTILIZATION]

    def test_take_nothing_when_that_is_switched_off(self) -> None:
        samples = Samples(history=False)
        samples.hear(said(0, {UTILIZATION: 50.0}))
        assert [{"loss": 1}] == values_of(samples.into([row(0, {"loss": 1})]))

    def test_do_not_take_again_after_a_crash_what_a_row_holds(self) -> None:
        first = Samples()
        first.hear(said(0, {UTILIZATION: 50.0}))
        first.into([row(0)])

        second = Samples()
        second.restore(first.state())
        second.hear(said(0, {UTILIZATION: 50.0}))
        assert [{"loss": 1}] == values_of(second.into([row(1, {"loss": 1})]))
        second.hear(said(1, {UTILIZATION: 60.0}))
        assert 60.0 == second.into([row(2)])[0].values[UTILIZATION]


class TestNodes:
    def test_are_in_the_names_when_there_are_several(self) -> None:
        samples = Samples()
        samples.meet({"b": 0, "a": 8})

        samples.hear(said(0, {UTILIZATION: 50.0, "sidestep/lag_s": 1.0}, node="b"))
        samples.hear(said(1, {UTILIZATION: 60.0}, node="a"))

        values = samples.into([row(0)])[0].values
        assert (50.0, 60.0) == (values["system/node0/gpu0/utilization"], values["system/node1/gpu0/utilization"])
        assert 1.0 == values["sidestep/node0/lag_s"]
        stream, _ = samples.take()
        assert [("b", True), ("a", True)] == [(it.node, UTILIZATION in it.values) for it in stream]

    def test_keep_their_numbers(self) -> None:
        samples = Samples()
        samples.meet({"b": 8})
        samples.meet({"b": 8, "a": 0})
        samples.hear(said(0, {"system/cpu/percent": 1.0}, node="b"))
        assert "system/node0/cpu/percent" in samples.into([row(0)])[0].values

    def test_that_are_many_are_told_of_together(self) -> None:
        samples = Samples()
        samples.meet({f"n{i}": i for i in range(6)})
        for i in range(6):
            samples.hear(said(i, {UTILIZATION: 10.0 * i, "system/gpu0/power_w": 100.0}, node=f"n{i}"))

        values = samples.into([row(0)])[0].values

        assert (25.0, 0.0) == (values["system/gpu/utilization.mean"], values["system/gpu/utilization.min"])
        assert 600.0 == values["system/gpu/power_w.sum"]
        assert not [name for name in values if "/node" in name or "/gpu0" in name]

    def test_that_are_many_are_told_of_when_all_are_heard(self) -> None:
        """Half a sum is none; but who never says anything is not waited for."""
        samples = Samples()
        samples.meet({f"n{i}": i for i in range(5)})
        for i in range(4):
            samples.hear(said(i, {"system/gpu0/power_w": 100.0}, node=f"n{i}"), 10.0 + i)
        assert "system/gpu/power_w.sum" not in samples.into([row(0)])[0].values

        samples.hear(said(5, {"system/gpu0/power_w": 100.0}, node="n3"), 12.0 + FRESH_S)

        assert 200.0 == samples.into([row(0)])[0].values["system/gpu/power_w.sum"]

    def test_may_have_clocks_that_are_wrong(self) -> None:
        samples = Samples()
        samples.meet({f"n{i}": i for i in range(5)})
        for i in range(5):
            read = said(i, {"system/gpu0/power_w": 100.0}, node=f"n{i}", time=1000.0 * i)
            samples.hear(read, now=10.0 + i)
        assert 500.0 == samples.into([row(0)])[0].values["system/gpu/power_w.sum"]

    def test_are_known_by_their_lowest_rank(self) -> None:
        from sidestepd.resolve import SessionFacts

        sessions = [
            SessionFacts(rank=9, local_rank=1, node="b"),
            SessionFacts(rank=1, local_rank=1, node="a"),
            SessionFacts(rank=0, node="c", role="sampler"),
        ]
        assert {"b": 8, "a": 0} == first_ranks(sessions)


class TestTorch:
    def test_is_told_of_the_gpu_with_that_uuid(self) -> None:
        samples = Samples()
        samples.hear(said(0, {}, gpus=GPUS))
        samples.hear(torch_said(1, 7.0))
        assert {"system/gpu1/memory_allocated": 7.0} == samples.take()[0][-1].values

    def test_of_several_processes_on_one_gpu_adds_up(self) -> None:
        samples = Samples()
        samples.hear(said(0, {}, gpus=GPUS))
        samples.hear(torch_said(1, 7.0, session=1))
        samples.hear(torch_said(2, 5.0, session=2))
        assert {"system/gpu1/memory_allocated": 12.0} == samples.take()[0][-1].values
        samples.hear(torch_said(3, 5.0, session=2, time=2 + FRESH_S))
        assert {"system/gpu1/memory_allocated": 5.0} == samples.take()[0][-1].values

    def test_silent_is_made_up_for_by_what_nvml_calls_used(self) -> None:
        samples = Samples()
        used = {"system/gpu0/memory_used_bytes": 9.0, "system/gpu1/memory_used_bytes": 8.0}
        samples.hear(said(0, {}, gpus=GPUS))
        samples.hear(torch_said(1, 7.0))
        samples.hear(said(2, used))

        values = samples.take()[0][-1].values

        assert (9.0, 9.0) == (values["system/gpu0/memory_allocated"], values["system/gpu0/memory_reserved"])
        assert "system/gpu1/memory_allocated" not in values
        samples.hear(said(3, used, time=2 + FRESH_S))
        assert 8.0 == samples.take()[0][-1].values["system/gpu1/memory_allocated"]

    def test_is_not_silent_from_one_sample_to_the_next_however_seldom_they_are(self) -> None:
        samples = Samples(interval_s=120.0)
        samples.hear(said(0, {}, gpus=GPUS))
        samples.hear(torch_said(1, 7.0))
        samples.hear(said(2, {"system/gpu1/memory_used_bytes": 8.0}, time=119.0))
        assert "system/gpu1/memory_allocated" not in samples.take()[0][-1].values


class TestEnergy:
    def hear(self, samples: Samples, seq: int, *, joules: float, utilization: float = 100.0, gpu: int = 0) -> None:
        prefix = f"system/gpu{gpu}/"
        samples.hear(said(seq, {f"{prefix}energy_j": joules, f"{prefix}utilization": utilization}))

    def test_of_a_step_is_what_was_used_between_two_rows(self) -> None:
        samples = Samples(samples_metric="seen")
        self.hear(samples, 0, joules=1000)
        assert 0 == samples.into([row(0, {"seen": 0})])[0].values["system/energy_j"]

        self.hear(samples, 1, joules=1300)
        values = samples.into([row(10, {"seen": 60}, places={"global_step": 10})])[0].values

        assert 300 == values["system/energy_j"]
        assert 30 == values["system/energy_per_step_j"]
        assert 5 == values["system/energy_per_sample_j"]

    @pytest.mark.parametrize("offset", [1, 25, 49])
    def test_is_the_same_whenever_something_else_is_read_of_the_machine(self, offset: int) -> None:
        """30 J a step and 3.75 a sample, GPUs and CPU read every 50 steps, at other moments."""
        samples = Samples(samples_metric="seen")
        told = []
        for step in range(301):
            if step % 50 == 0:
                self.hear(samples, 2 * step, joules=30.0 * step)
            if step % 50 == offset:
                samples.hear(said(2 * step + 1, {"system/cpu/percent": 1.0}))
            told += samples.into([row(step, {"seen": 8 * step}, places={"global_step": step})])

        for name, expected in (("system/energy_per_step_j", 30.0), ("system/energy_per_sample_j", 3.75)):
            assert [expected] * 6 == [it.values[name] for it in told if name in it.values]

    def test_of_a_sample_is_known_where_their_number_stands_in_other_rows(self) -> None:
        samples = Samples(samples_metric="seen")
        told = []
        for seq in range(8):
            self.hear(samples, seq, joules=100.0 * seq)
            seen = {"seen": 10 * seq} if seq % 3 == 0 else {}
            samples.into([row(2 * seq, seen, late=True)])  # is of another time
            told += samples.into([row(2 * seq, {}, places={"global_step": seq}), row(2 * seq + 1, seen)])

        values = [it.values.get("system/energy_per_sample_j") for it in told]

        assert [10.0, 10.0] == [value for value in values if value is not None]

    def test_goes_on_when_the_driver_begins_to_count_anew(self) -> None:
        samples = Samples()
        for seq, joules in enumerate((1000, 1100, 50, 80)):
            self.hear(samples, seq, joules=joules)
        assert 130 == samples.into([row(0)])[0].values["system/energy_j"]

    def test_survives_a_crash(self) -> None:
        first = Samples()
        self.hear(first, 0, joules=1000)
        self.hear(first, 1, joules=1100)
        first.into([row(0)])

        second = Samples()
        second.restore(first.state())
        self.hear(second, 1, joules=1100)
        self.hear(second, 2, joules=1150)

        assert 150 == second.into([row(5, places={"global_step": 5})])[0].values["system/energy_j"]

    def test_is_that_of_the_gpus_that_the_run_uses(self) -> None:
        samples = Samples()
        samples.hear(said(0, {}, gpus=GPUS))
        samples.hear(torch_said(1, 7.0))
        for seq, joules in ((2, 100), (3, 150)):
            self.hear(samples, seq, joules=joules, gpu=0)
            self.hear(samples, seq, joules=10 * joules, gpu=1)
        assert 500 == samples.into([row(0)])[0].values["system/energy_j"]

    def test_idle_gpu_seconds_are_those_without_a_kernel(self) -> None:
        samples = Samples(interval_s=1.0)
        for seq, utilization in ((0, 0.0), (1, 25.0), (2, 50.0), (100, 0.0)):  # nothing is known of the gap
            self.hear(samples, seq, joules=0, utilization=utilization)
        assert 1.25 == samples.into([row(0)])[0].values["system/gpu_idle_s"]

    def test_idle_time_is_known_too_when_samplers_were_asked_for_another_interval(self) -> None:
        """By the first worker, with x_stats_sampling_interval: that of the options is not theirs then."""
        samples = Samples(interval_s=5.0)
        for seq in (0, 30, 60, 90):
            self.hear(samples, seq, joules=0, utilization=50.0)
        again = Samples(interval_s=5.0)
        again.restore(samples.state())
        self.hear(again, 120, joules=0, utilization=50.0)
        self.hear(again, 420, joules=0, utilization=50.0)  # nothing is known of the gap
        assert 45.0 == again.into([row(0)])[0].values["system/gpu_idle_s"]

    def test_idle_time_is_not_told_where_nobody_knows_it(self) -> None:
        """With MIG NVML tells no utilization."""
        samples = Samples()
        samples.hear(said(0, {"system/gpu0/energy_j": 5.0}))
        samples.hear(said(1, {"system/gpu0/energy_j": 7.0, "system/gpu0/power_w": 2.0}))
        values = samples.into([row(0)])[0].values
        assert 2.0 == values["system/energy_j"]
        assert "system/gpu_idle_s" not in values


class TestRecords:
    def record(self, kind: Kind, data: dict[str, Any]) -> Record:
        return Record(kind=kind, time=5.0, step=None, data=data)

    @pytest.mark.parametrize(
        "data",
        [
            {},
            {"values": 3},
            {"values": {"a": "b"}},
            {"values": {"a": True}},
            {"values": {"a": float("nan")}},
            {"values": {}, "gpus": 3},
            {"values": {}, "ordinal": -1},
            {"values": {}, "ordinal": 0, "device": 3},
        ],
    )
    def test_that_say_no_samples_are_none(self, data: dict[str, Any]) -> None:
        assert sampled_from(self.record(Kind.SAMPLES, data), Position(1, 0), b"", "n") is None

    @pytest.mark.parametrize(
        "data", [{}, {"title": "t", "text": 3, "level": "INFO"}, {"title": "t", "text": "x", "level": "LOUD"}]
    )
    def test_that_say_no_alert_are_none(self, data: dict[str, Any]) -> None:
        assert alert_from(self.record(Kind.ALERT, data), Position(1, 0), "n") is None
