"""Log of every process, in RUN/logs: its messages, warnings and errors.

    RUN/logs/0003/000001.log    process 3, part 1: a new part at every start, and every 64 KiB

A part is rewritten as a whole, in the background, at most once in a few seconds: object stores
cannot append.
"""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator

import jax
from etils import epath

from ldm_jax.runtime import log
from ldm_jax.runtime.log import LOG

SECONDS = 2.0  # between two writes of a part that grows
LARGEST = 2**16  # characters of a part
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class RunLog(logging.Handler):
    """Keeps lines in memory until `begin` gives the run, then writes parts there."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter(FORMAT))
        self.folder: epath.Path | None = None
        self.lines: list[str] = []
        self.part = 0
        self.changed, self.ended = threading.Event(), threading.Event()
        self.writing = threading.Lock()
        threading.Thread(target=self._write_on, daemon=True, name="run log").start()

    def begin(self, run: epath.Path, process: int) -> None:
        """Write all lines to the run from now on, including those so far."""
        folder = run / "logs" / f"{process:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        parts = [int(path.stem) for path in folder.iterdir() if path.stem.isdigit()]
        self.part = max(parts, default=0) + 1
        self.folder = folder
        self.changed.set()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record) + "\n")
        self.changed.set()

    def flush(self) -> None:
        """Write new lines at once, in this thread."""
        with self.writing:
            self.changed.clear()
            if self.folder is None or not self.lines:
                return
            lines = list(self.lines)
            draft = self.folder / f".{self.part:06d}.part"
            draft.write_text("".join(lines))
            draft.replace(self.folder / f"{self.part:06d}.log")
            if sum(map(len, lines)) > LARGEST:
                self.part += 1
                del self.lines[: len(lines)]

    def close(self) -> None:
        self.ended.set()
        self.flush()
        self.changed.set()  # lets the thread end
        super().close()

    def _write_on(self) -> None:
        while self.changed.wait() and not self.ended.wait(SECONDS):
            try:
                self.flush()
            except OSError as error:  # training goes on without
                sys.stderr.write(f"the log is not written: {error}\n")
                return


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keep the records and warnings inside for the run that `begin` names.

    An error on the way out leaves its traceback there.
    """
    root, level, hook = logging.getLogger(), LOG.level, threading.excepthook
    handler = RunLog()
    root.addHandler(handler)
    LOG.setLevel(logging.INFO)
    logging.captureWarnings(True)
    threading.excepthook = _log_thread_exception
    try:
        yield
    except BaseException as error:
        if not isinstance(error, SystemExit):
            LOG.error("stopped by an error", exc_info=error, extra=log.ONLY_FILE)
        raise
    finally:
        threading.excepthook = hook
        logging.captureWarnings(False)
        LOG.setLevel(level)
        root.removeHandler(handler)
        handler.close()


def begin(run: epath.Path) -> None:
    """Set the run of this process's log; outside of `kept`, do nothing."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, RunLog):
            handler.begin(run, jax.process_index())


def flush(seconds: float | None = None) -> None:
    """Write all lines before an exit without clean-up; waits `seconds` at most."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, RunLog):
            thread = threading.Thread(target=handler.flush, daemon=True)
            thread.start()
            thread.join(seconds)


def _log_thread_exception(arguments: threading.ExceptHookArgs) -> None:
    name = arguments.thread.name if arguments.thread else "unknown"
    LOG.error("error in thread %s", name, exc_info=arguments.exc_value)
