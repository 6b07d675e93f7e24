"""A replay's runs and requests as Parquet files (docs/metrics.md, *Saved replays*)."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from semipd.core import StepRecord
from semipd.metrics import RequestTable

ROWS = 2**16
"""Rows of a row group: what is held before it is written."""

RUNS = pa.schema(
    {
        "run": pa.int64(),
        "phase": pa.string(),
        "allocation": pa.string(),
        "sms": pa.int32(),
        "start_s": pa.float64(),
        "end_s": pa.float64(),
        "steps": pa.int64(),
        "requests": pa.int32(),
        "new_tokens": pa.int64(),
        "finished": pa.list_(pa.int64()),
        "lookups": pa.int64(),
        "extrapolated": pa.int64(),
    }
)


class RunWriter:
    """Writes runs as they end, a row group at a time; complete when the context ends, however it does."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, RUNS)
        self._rows: list[tuple[Any, ...]] = []

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        self._writer.close()

    def add(self, record: StepRecord) -> None:
        """Take note of a run that ended."""
        run = record.run
        self._rows.append(
            (
                run.id, run.phase.value, run.allocation.name, run.sms, record.start_s, record.end_s, record.steps,
                len(run.requests), sum(run.new_tokens), record.finished, record.lookups, record.extrapolated,
            )
        )  # fmt: skip
        if len(self._rows) == ROWS:
            self._flush()

    def _flush(self) -> None:
        columns = zip(*self._rows, strict=True) if self._rows else ((),) * len(RUNS)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, RUNS, strict=True)]
        self._writer.write_table(pa.table(arrays, schema=RUNS))
        self._rows = []


def write_requests(path: Path, requests: RequestTable) -> None:
    """Write a row a request; what did not happen is null."""
    columns = requests.columns()
    table = pa.table({name: pa.array(column, mask=np.isnan(column)) for name, column in columns.items()})
    pq.write_table(table, path, row_group_size=ROWS)
