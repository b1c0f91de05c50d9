"""Stop in order from the first moment: during imports, start-up and compilation, before any step.

Nothing is lost then, so that the process leaves at once, with the exit code that says "start again"
to schedulers. Imports nothing but the standard library: it stands before all other imports.
"""

import ctypes
import os
import signal
import sys
import threading
from types import FrameType

INTERRUPTED = 75  # EX_TEMPFAIL, as `cli.INTERRUPTED`
SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_leaving = threading.Lock()
_handlers: list[int | None] = []  # addresses of handlers in C that stand back


def install() -> None:
    """Leave with code 75 on SIGTERM and SIGHUP until others handle them, as the training loop does.

    A signal that whoever started the process has ignored (`nohup`) stays ignored. Python runs its
    handlers when the main thread comes back from C, which compiles for minutes: a thread looks.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    numbers = [n for n in SIGNALS if signal.getsignal(n) == signal.SIG_DFL]
    if not numbers:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, leave)
    threading.Thread(target=_look, args=(reader,), name="early", daemon=True).start()


def leave(number: int, frame: FrameType | None) -> None:
    """End the process, whose main thread may be anywhere."""
    del frame
    if not _leaving.acquire(blocking=False):
        return  # the other of main thread and `_look` is at it
    sys.stderr.write(f"ldm-train: stopped by {signal.Signals(number).name} before its first step\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def _look(reader: int) -> None:
    while data := os.read(reader, 1):
        if signal.getsignal(data[0]) is leave:  # else the main thread's own handler does it
            leave(data[0], None)


def install_again() -> None:
    """Take SIGTERM back from JAX, which takes it when processes join, until `hand_over`.

    JAX's handler only makes a note, for the training loop; before its first step nobody looks.
    """
    if signal.getsignal(signal.SIGTERM) is leave:  # as Python has it; in truth it may be JAX's
        _handlers.append(_libc_signal(signal.SIGTERM, None))
        signal.signal(signal.SIGTERM, leave)


def hand_over() -> None:
    """Give SIGTERM to the handler that it was taken from, which Python cannot see."""
    if _handlers:
        _libc_signal(signal.SIGTERM, _handlers.pop())


def _libc_signal(number: int, handler: int | None) -> int | None:
    """`signal` of C: sets the address of a handler, and returns that of the former one."""
    function = ctypes.CDLL(None).signal
    function.argtypes, function.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    return function(number, handler)
