"""What must hold of the rows of a run, whatever happened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sidestepd.rows import MAIN_AXIS, PROCESS, Row

# What must hold of the rows of a run, whatever happened


def assert_steps_increase(rows: Sequence[Row]) -> None:
    steps = [row.step for row in rows]

    assert sorted(set(steps)) == steps


def assert_shift_explains_steps(rows: Sequence[Row]) -> None:
    shift = 0
    for row in rows:
        if MAIN_AXIS in row.places and not row.late and not row.apart:
            shift = row.values.get("sidestep/step_shift", shift)

            assert row.step == row.places[MAIN_AXIS] + shift


def assert_axes_are_data(rows: Sequence[Row]) -> None:
    for row in rows:
        assert row.places == {axis: row.values[axis] for axis in row.places}


def assert_on_time_rows_are_in_order(rows: Sequence[Row]) -> None:
    by_owner: dict[tuple[str, Any], list[int]] = {}
    for row in rows:
        for axis in row.places if not row.late else ():
            by_owner.setdefault((axis, row.values.get(PROCESS)), []).append(row.places[axis])
    for steps in by_owner.values():
        assert sorted(set(steps)) == steps


def assert_rows_are_sound(rows: Sequence[Row]) -> None:
    assert_steps_increase(rows)
    assert_shift_explains_steps(rows)
    assert_axes_are_data(rows)
    assert_on_time_rows_are_in_order(rows)
