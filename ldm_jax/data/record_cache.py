"""Decoded records in memory, so that a small dataset is read and decoded once."""

import threading
from typing import Any

OBJECTS = 2048
"""Rough size in bytes of the Python objects around a record."""


class RecordCache:
    """Cache of values by record number up to a number of bytes, without eviction: the first stay.

    Eviction would gain nothing: every epoch reads each record once, in a new order, so the record
    used last is as far from its next use as any other. Threads share one cache; pickled into a
    worker process, it arrives empty, with the same limit.
    """

    def __init__(self, limit: int):
        self._limit, self._used = limit, 0
        self._values: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return RecordCache, (self._limit,)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, record: int) -> Any:
        """The value of a record, or None."""
        return self._values.get(record)

    def put(self, record: int, value: Any, size: int) -> None:
        """Keeps `value`, of `size` bytes, if there is room."""
        with self._lock:
            if record not in self._values and self._used + size + OBJECTS <= self._limit:
                self._used += size + OBJECTS
                self._values[record] = value
