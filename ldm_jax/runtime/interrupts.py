"""Ctrl-C is answered at once, by a thread.

Python runs a signal's handler between two steps of the main thread, which may wait minutes for a
compiler or a device. The byte of `signal.set_wakeup_fd` comes when the signal does.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from ldm_jax.runtime.log import LOG

CODE = 130  # 128 + SIGINT


@contextlib.contextmanager
def answered(
    *lines: str, after: float = 0.0, leave: Callable[[int], None] = os._exit
) -> Iterator[None]:
    """Log the first line at the first Ctrl-C inside, and so on; one more ends the process.

    Other signals are passed on to whoever was told of signals before.
    after: seconds in which the block may end by itself, with nothing left to be said.
    Outside the main thread, where Python takes no signals, nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    ended = threading.Event()
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = threading.Thread(
        target=_answer,
        args=(read, lines, after, ended, leave, before),
        daemon=True,
        name="interrupts",
    )
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        ended.set()
        os.close(write)  # which ends the thread
        thread.join()


def _answer(
    read: int,
    lines: tuple[str, ...],
    after: float,
    ended: threading.Event,
    leave: Callable[[int], None],
    others: int,
) -> None:
    left = list(lines)
    with os.fdopen(read, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] != signal.SIGINT:
                if others >= 0:
                    os.write(others, number)
                continue
            if ended.wait(after):
                continue
            if left:
                LOG.info(left.pop(0))
            else:
                sys.stderr.flush()
                leave(CODE)
