"""Conversion: what a user logs becomes plain, or is refused in words, and never waits for a device."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import math
import re
import uuid
from collections import OrderedDict, deque, namedtuple
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import sidestep
from sidestep.convert import plain
from sidestep.errors import UnsupportedValue
from sidestep.testing import record
from sidestep.wire import MAX_DEPTH, MAX_RECORD_BYTES

Point = namedtuple("Point", "x y")


@dataclasses.dataclass
class Options:
    lr: object = 0.1
    widths: tuple[int, ...] = (3, 4)


class Level(enum.Enum):
    HIGH = "the highest"


class Priority(enum.IntEnum):
    URGENT = 7


class Shout(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "something else"


def nested(levels: int) -> Any:
    value: Any = 1.0
    for _ in range(levels):
        value = [value]
    return value


STANDARD = [
    (1, 1),
    (True, True),
    (None, None),
    ("text", "text"),
    (math.inf, math.inf),
    (2**64 - 1, 2**64 - 1),
    (-(2**63), -(2**63)),
    (2**64, 2.0**64),
    (-(2**70), -(2.0**70)),
    (1 + 2j, "1+2j"),
    (complex(0, -1.5), "-1.5j"),
    (b"bytes", "bytes"),
    (bytearray(b"\xff"), "\N{REPLACEMENT CHARACTER}"),
    ("lone \ud800 surrogate", "lone ? surrogate"),
    (Shout("as it is"), "as it is"),
    (Decimal("1.5"), 1.5),
    (Decimal("1e999"), math.inf),
    (Fraction(1, 4), 0.25),
    (datetime.date(2024, 2, 29), "2024-02-29"),
    (datetime.timedelta(seconds=90), "0:01:30"),
    (Level.HIGH, "HIGH"),
    (Priority.URGENT, 7),
    (Path("a/b"), "a/b"),
    (uuid.UUID(int=0), "00000000-0000-0000-0000-000000000000"),
]

CONTAINERS = [
    ((1, 2), [1, 2]),
    ({3}, [3]),
    (Point(1, 2), [1, 2]),
    ([[1], {"a": None}], [[1], {"a": None}]),
    (OrderedDict(a=(1,)), {"a": [1]}),
    (
        {7: "int", 2.5: "float", True: "bool", None: "none"},
        {"7": "int", "2.5": "float", "true": "bool", "null": "none"},
    ),
    ({np.int64(3): 1}, {"3": 1}),
    ({("a", 1): 2}, {"a,1": 2}),
    (deque([1, (2,)]), [1, [2]]),
    (range(3), [0, 1, 2]),
    (torch.Size([2, 3]), [2, 3]),
    (Options(), {"lr": 0.1, "widths": [3, 4]}),
    ([Options(lr=Fraction(1, 2))], [{"lr": 0.5, "widths": [3, 4]}]),
]

NUMPY = [
    (np.float32(0.5), 0.5),
    (np.float64(0.1), 0.1),
    (np.float16(2.0), 2.0),
    (np.longdouble(1.25), 1.25),
    (np.int8(-3), -3),
    (np.uint64(2**64 - 1), 2**64 - 1),
    (np.bool_(True), True),
    (np.str_("text"), "text"),
    (np.complex64(1j), "1j"),
    (np.array(4), 4),
    (np.array([4.5]), 4.5),
    (np.arange(3), [0, 1, 2]),
    (np.ones((2, 2)), [[1.0, 1.0], [1.0, 1.0]]),
    (np.zeros(0), []),
    (np.array([1, None], dtype=object), [1, None]),
    (np.datetime64("2024-02-29"), "2024-02-29"),
    (np.array(["2024-02-29", "2024-03-01"], dtype="datetime64[D]"), ["2024-02-29", "2024-03-01"]),
]

TORCH = [
    (torch.tensor(1.5), 1.5),
    (torch.tensor(3), 3),
    (torch.tensor(True), True),
    (torch.tensor([2.5]), 2.5),
    (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    (torch.tensor(1.5, requires_grad=True), 1.5),
    (torch.nn.Parameter(torch.tensor([1.0, 2.0])), [1.0, 2.0]),
    (torch.arange(4).reshape(2, 2), [[0, 1], [2, 3]]),
    (torch.eye(2).to_sparse(), [[1.0, 0.0], [0.0, 1.0]]),
    (np.dtype("float32"), "float32"),
    (torch.float32, "torch.float32"),
    (torch.device("cpu"), "cpu"),
]


def shown(value: object) -> str:
    """A test's name: without addresses, which differ from process to process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))[:40]


@pytest.mark.parametrize(("value", "expected"), STANDARD + CONTAINERS + NUMPY + TORCH, ids=shown)
class TestConverted:
    def test_becomes_plain_and_can_be_packed(self, value: Any, expected: Any):
        made = plain(value)

        assert expected == made
        assert type(expected) is type(made)
        assert expected == msgpack.unpackb(msgpack.packb(made, strict_types=True))


class TestMembers:
    def test_are_logged_by_their_values_and_configured_by_their_names(self):
        """As wandb does it."""
        with record() as log:
            run = sidestep.init(config={"level": Level.HIGH})
            run.log({"level": Level.HIGH, "urgent": Priority.URGENT})
            run.finish()

        assert (["the highest"], [7]) == (log["level"], log["urgent"])
        assert {"level": "HIGH"} == log.config


class TestRefused:
    @pytest.mark.parametrize(
        ("value", "why"),
        [
            (object(), "builtins.object"),
            (10**400, "beyond the range of a float"),
            (Fraction(10**400), "beyond the range"),
            (np.arange(33), "33 elements"),
            (torch.zeros(33), "33 elements"),
            (torch.zeros(2, device="meta"), "'meta'"),
            (torch.Generator(), "torch's Generator"),
            (nested(MAX_DEPTH + 1), "deeper"),
            ("x" * (MAX_RECORD_BYTES + 1), "larger"),
            ([0] * (MAX_RECORD_BYTES + 1), "larger"),
            ({frozenset({1}): "a set as key"}, "keys"),
            (range(MAX_RECORD_BYTES + 1), "larger"),
            (lambda: None, "function"),
        ],
        ids=shown,
    )
    def test_is_told_why(self, value: Any, why: str):
        with pytest.raises(UnsupportedValue, match=why):
            plain(value)

    def test_a_fake_tensor_is_not_read(self):
        with FakeTensorMode():
            fake = torch.zeros(())

        with pytest.raises(UnsupportedValue, match="FakeTensor"):
            plain(fake)

    def test_a_tensor_inside_vmap_is_refused(self):
        refused = []

        def look(row: torch.Tensor) -> torch.Tensor:
            try:
                plain(row)
            except UnsupportedValue as error:
                refused.append(str(error))
            return row

        torch.vmap(look)(torch.zeros(3))

        assert len(refused) == 1

    def test_a_tensor_elsewhere_is_refused_by_its_device_alone(self):
        """Reading a GPU's value makes the loop wait for it, so nothing but `device` may be touched."""

        class Remote(torch.Tensor):
            @property
            def device(self):
                return torch.device("cuda:0")

            def item(self):
                raise AssertionError("this would have waited for the GPU")

            tolist = numel = item

        with pytest.raises(UnsupportedValue, match="cuda"):
            plain(torch.zeros(()).as_subclass(Remote))

    def test_an_object_that_holds_itself_comes_to_an_end(self):
        circle: list[Any] = []
        circle.append(circle)

        with pytest.raises(UnsupportedValue, match="deeper"):
            plain(circle)

    def test_a_small_object_that_unfolds_into_a_huge_one_comes_to_an_end(self):
        bomb: Any = 0
        for _ in range(MAX_DEPTH):
            bomb = [bomb] * 100

        with pytest.raises(UnsupportedValue, match="larger"):
            plain(bomb)


class TestSnapshot:
    def test_later_changes_do_not_show(self):
        inner = [1]
        value = {"a": inner}

        made = plain(value)
        inner.append(2)

        assert {"a": [1]} == made

    def test_the_greatest_depth_that_is_allowed_is(self):
        assert nested(MAX_DEPTH) == plain(nested(MAX_DEPTH))

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
            lambda inner: (
                st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
            ),
            max_leaves=20,
        )
    )
    def test_whatever_is_made_of_plain_things_becomes_plain_once_and_for_all(self, value: Any):
        try:
            made = plain(value)
        except UnsupportedValue:
            return

        assert made == plain(made)
        assert made == msgpack.unpackb(msgpack.packb(made, strict_types=True))
