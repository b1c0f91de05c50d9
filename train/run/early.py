"""Stop in order from the first moment: during imports, start-up and compilation, before any step.

Nothing is lost then, so that the process leaves at once, with the exit code that says "start again"
to schedulers. Imports nothing but the standard library: it stands before all other imports.
"""

import os
import signal
import sys
import threading
from types import FrameType

INTERRUPTED = 75  # EX_TEMPFAIL, as `cli.INTERRUPTED`
SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_leaving = threading.Lock()


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
