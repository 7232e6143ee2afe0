"""Tables: rows of plain values and media.

- rows are packed when the table is logged, all of them; of an incremental table those that are new since it was
  logged last, so that a table which grows row by row does not travel again and again
- a row of a wrong length, and what is beyond 200,000 rows, is left out, counted and said; wandb raises
- columns may mix types: wandb 0.31 raises there, and the table is lost; here it is shown with mixed types
- a table that was logged may go on growing and be logged again, whatever its mode; with wandb's default mode the
  later calls show the first state
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any, ClassVar

from sidestep.errors import UnsupportedValue
from sidestep.media import cells
from sidestep.media.base import Blobs, Files, Media
from sidestep.media.value import refuse

MODES = ("IMMUTABLE", "MUTABLE", "INCREMENTAL")
COLUMNS = ("Input", "Output", "Expected")
"""wandb's columns where none are named."""


class Table(Media):
    """A table of `data`, a list of rows; or of a `dataframe`; or empty, to be filled by `add_data`.

    wandb's panels show the first 10,000 rows, its tables up to 200,000. `dtype` and `optional` are taken for
    wandb's sake; types follow from the data.
    """

    kind: ClassVar[str] = "table"
    MAX_ROWS: ClassVar[int] = 10_000
    MAX_ARTIFACT_ROWS: ClassVar[int] = 200_000

    def __init__(
        self,
        columns: Any = None,
        data: Any = None,
        rows: Any = None,
        dataframe: Any = None,
        dtype: Any = None,  # noqa: ARG002 - wandb's
        optional: Any = True,  # noqa: ARG002 - wandb's
        allow_mixed_types: bool = False,
        log_mode: str | None = "IMMUTABLE",
    ) -> None:
        self.columns: list[Any] = []
        self.data: list[list[Any]] = []
        self.log_mode = log_mode
        self._mixed = bool(allow_mixed_types)
        self._wrong = "" if log_mode in MODES else f"log_mode={log_mode!r:.40}: it may be {', '.join(MODES)}"
        self._id = secrets.token_hex(8)
        self._increment = 0
        self._logged = 0
        try:
            self._fill(columns, data if data is not None else rows, dataframe)
        except UnsupportedValue as error:
            self._wrong = str(error)
        except Exception as error:  # noqa: BLE001 - a foreign value's own code may raise anything
            self._wrong = f"reading it raised {type(error).__name__}: {error!s:.200}"

    def add_data(self, *data: Any) -> None:
        """Add a row: as many values as there are columns."""
        if len(data) != len(self.columns):
            why = f"{len(data)} values, and {len(self.columns)} columns: {self.columns!r:.200}"
            return refuse("row of a table", tuple, why)
        if len(self.data) >= self.MAX_ARTIFACT_ROWS:
            return refuse("row of a table", tuple, f"a table has at most {self.MAX_ARTIFACT_ROWS} rows")
        self.data.append(list(data))
        return None

    def add_row(self, *row: Any) -> None:
        """The old name of `add_data`."""
        self.add_data(*row)

    def add_column(self, name: Any, data: Any, optional: bool = False) -> None:  # noqa: ARG002 - wandb's
        """Add a column: as many values as there are rows."""
        values = list(data)
        if self.columns and self.data and len(values) != len(self.data):
            return refuse("column of a table", list, f"{len(values)} values, and {len(self.data)} rows")
        if not self.data:
            self.data = [[] for _ in values]
        self.columns.append(name)
        for row, value in zip(self.data, values, strict=True):
            row.append(value)
        return None

    def add_computed_columns(self, fn: Callable[[int, dict[Any, Any]], Mapping[Any, Any]]) -> None:
        """Add what a function makes of each row, given its number and its values by column."""
        try:
            rows = [fn(at, dict(zip(self.columns, row, strict=True))) for at, row in enumerate(self.data)]
            computed = {name: [row[name] for row in rows] for row in rows[:1] for name in row}
        except Exception as error:  # noqa: BLE001 - a function of the user's, which may raise anything
            return refuse(
                "columns of a table", type(fn), f"computing them raised {type(error).__name__}: {error!s:.200}"
            )
        for name, values in computed.items():
            self.add_column(name, values)
        return None

    def cast(self, col_name: Any, dtype: Any, optional: bool = False) -> None:
        """Without effect, as `dtype`: types follow from the data."""

    def set_pk(self, key_column: Any) -> None:
        """Without effect: a table here stands by itself."""

    def set_fk(self, col_name: Any, table: Any, table_col: Any) -> None:
        """Likewise."""

    def get_dataframe(self) -> Any:
        """The table as pandas has it."""
        pandas: Any = import_module("pandas")  # who asks for this has it
        return pandas.DataFrame.from_records(self.data, columns=self.columns)

    def get_column(self, name: Any, convert_to: str | None = None) -> Any:
        """The values of a column; `convert_to="numpy"` gives an array, where numpy is loaded."""
        at = self.columns.index(name)
        values = [row[at] for row in self.data]
        if convert_to != "numpy":
            return values
        import sys

        numpy = sys.modules.get("numpy")
        return values if numpy is None else numpy.array(values)

    def get_index(self) -> list[int]:
        """The numbers of the rows."""
        return list(range(len(self.data)))

    def iterrows(self) -> Iterator[tuple[int, list[Any]]]:
        """The rows with their numbers."""
        yield from enumerate(self.data)

    def pack(self, blobs: Blobs) -> dict[str, Any]:
        """All rows; of an incremental table, the new ones."""
        if self._wrong:
            raise UnsupportedValue(self._wrong)
        new = self.data[self._logged :] if self.log_mode == "INCREMENTAL" else self.data[:]
        facts = {
            "columns": [column if isinstance(column, int) else str(column) for column in self.columns],
            "mode": self.log_mode,
            "mixed": self._mixed,
            **cells.packed(new, blobs),
        }
        if self.log_mode == "INCREMENTAL":
            facts |= {"id": self._id, "increment": self._increment, "total": len(self.data)}
            self._increment, self._logged = self._increment + 1, len(self.data)
        return facts

    def _fill(self, columns: Any, data: Any, dataframe: Any) -> None:
        if dataframe is None and type(data).__name__ == "DataFrame":
            dataframe = data
        if dataframe is not None:
            self.columns = list(dataframe.columns)
            data = zip(*(dataframe[column].tolist() for column in self.columns), strict=True)
        else:
            self.columns = _column_names(COLUMNS if columns is None else columns)
        if data is not None and not isinstance(data, Iterable):
            raise UnsupportedValue(f"data= is a list of rows, not a {type(data).__name__}")
        for row in () if data is None else data:
            if isinstance(row, str) or not isinstance(row, Iterable):
                raise UnsupportedValue(f"data= is a list of rows, each a list of values, not of {row!r:.80}")
            self.add_data(*row)


def _column_names(columns: Any) -> list[Any]:
    if isinstance(columns, str) or not isinstance(columns, Iterable):
        raise UnsupportedValue(f"columns= is a list of names, not {columns!r:.80}")
    return list(columns)


# In the daemon


def show(facts: Mapping[str, Any], files: Files) -> Any:
    """A `wandb.Table`."""
    columns, rows = list(facts["columns"]), cells.shown(facts, files)
    if any(len(row) != len(columns) for row in rows):
        raise ValueError(f"a table of {len(columns)} columns has a row that is longer or shorter")
    table = _table(columns, rows, facts)
    if facts["mode"] == "INCREMENTAL":
        table._increment_num = int(facts["increment"])
        table._previous_increments_paths = []
        table.bind_to_run = functools.partial(_bind, table)
        table.to_json = functools.partial(_to_json, table, int(facts["total"]))
    return table


def _table(columns: list[Any], rows: list[list[Any]], facts: Mapping[str, Any]) -> Any:
    import wandb

    if not facts.get("mixed"):
        try:
            return wandb.Table(columns=columns, data=rows, log_mode=facts["mode"])
        except TypeError:
            pass  # a column of several types
    try:
        return wandb.Table(columns=columns, data=rows, log_mode=facts["mode"], allow_mixed_types=True)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"wandb makes no table of it: {error}") from error


def _bind(table: Any, run: Any, key: Any, *args: Any, **keywords: Any) -> None:
    """What went before, of which wandb makes one table, is told by the run: here is only what is new."""
    import wandb

    if table._increment_num > 0:
        before = run.summary.get(key)
        if hasattr(before, "get") and before.get("_type") == "incremental-table-file":
            paths = list(before.get("previous_increments_paths") or [])
            last = before.get("artifact_path")
            table._previous_increments_paths = [*paths, last] if last else paths
    wandb.Table.bind_to_run(table, run, key, *args, **keywords)  # type: ignore[no-untyped-call]


def _to_json(table: Any, total: int, run_or_artifact: Any) -> dict[str, Any]:
    import wandb

    found: dict[str, Any] = wandb.Table.to_json(table, run_or_artifact)
    return found | {"nrows": total} if isinstance(run_or_artifact, wandb.Run) else found
