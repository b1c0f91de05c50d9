"""Decoded records in memory, so that a small dataset is read and decoded once."""

import threading
from typing import Any

OBJECTS = 2048
"""Bytes that Python's objects around a record take, roughly."""


class RecordCache:
    """Values by the number of their record, up to a number of bytes; the first that come stay.

    Nothing makes room for another: every epoch asks for each record once, in an order of its own,
    so what was used last is as far from its next use as anything else. Threads share one of these;
    a worker process that it is sent to begins with an empty one of the same size.
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
        """What was put there, or None."""
        return self._values.get(record)

    def put(self, record: int, value: Any, size: int) -> None:
        """Keeps `value`, of `size` bytes, if there is room."""
        with self._lock:
            if record not in self._values and self._used + size + OBJECTS <= self._limit:
                self._used += size + OBJECTS
                self._values[record] = value
