"""Logger of the library, and the handler through which commands show its records on stderr.

The library and the recipes log to "ldm_jax"; INFO is what a user should read. Nothing is shown
before a command enters `shown`, or a user of the library configures `logging`.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import TextIO

LOG = logging.getLogger("ldm_jax")
LOG.addHandler(logging.NullHandler())  # else Python itself prints warnings of the library

ONLY_FILE = {"only_file": True}
"""`extra` of a record that goes to the run's log and not to the terminal."""


def process_index() -> int:
    """Index of this process; 0 before the processes are joined. Does not initialize the devices."""
    import jax

    return jax.process_index() if jax.distributed.is_initialized() else 0


class Terminal(logging.StreamHandler):
    """Prints messages on stderr: of the library from INFO on, of others from WARNING on.

    Process 0 prints; the others print errors alone, with their number in front. Progress bars make
    room for a line and are drawn again below it.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self, logging.INFO)

    @property
    def stream(self) -> TextIO:
        return sys.stderr  # looked up at every call: tests replace it

    def filter(self, record: logging.LogRecord) -> bool:
        ours = record.name.partition(".")[0] == LOG.name
        if getattr(record, "only_file", False) or not (ours or record.levelno >= logging.WARNING):
            return False
        return record.levelno >= logging.ERROR or process_index() == 0

    def format(self, record: logging.LogRecord) -> str:
        index = process_index()
        return (f"process {index}: " if index else "") + super().format(record)

    def emit(self, record: logging.LogRecord) -> None:
        import tqdm

        with tqdm.tqdm.external_write_mode(sys.stderr):
            if sys.stderr.isatty():
                sys.stderr.write("\r\x1b[K")  # also a ^C behind the bar
            super().emit(record)


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Show records on stderr inside, through one `Terminal` however often this is entered.

    Plain stream handlers of the root logger, as the import of Orbax adds one, rest meanwhile.
    """
    root, level = logging.getLogger(), LOG.level
    if any(isinstance(handler, Terminal) for handler in root.handlers):
        yield
        return
    others = [h for h in root.handlers if type(h) is logging.StreamHandler]
    terminal = Terminal()
    for handler in others:
        root.removeHandler(handler)
    root.addHandler(terminal)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.setLevel(level)
        root.removeHandler(terminal)
        for handler in others:
            root.addHandler(handler)
