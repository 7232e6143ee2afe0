"""An assembler, and bundles for it."""

from __future__ import annotations

from typing import Any

from sidestepd.assemble import Assembler
from sidestepd.rows import Bundle, Row
from sidestepd.rules import Rule, Rules
from tests.support.builders import bundle

PATIENCE = 5.0


def assembler(*rules: Rule, max_wait: float = 60.0, window: int = 1000) -> Assembler:
    return Assembler(Rules(rules), patience=PATIENCE, max_wait=max_wait, window=window)


def add(to: Assembler, *bundles: Bundle, now: float = 0.0, world: int = 1) -> list[Row]:
    return to.add(bundles, world=world, now=now)


def main(step: int, data: dict[str, Any] | None = None, **options: Any) -> Bundle:
    return bundle(step, data or {"loss": 0.5}, **options)


def evaluation(step: int, data: dict[str, Any] | None = None, **options: Any) -> Bundle:
    return bundle(step, data or {"eval/acc": 0.9}, axis="eval/step", **options)


def places(rows: list[Row]) -> list[tuple[int, dict[str, int]]]:
    return [(row.step, dict(row.places)) for row in rows]
