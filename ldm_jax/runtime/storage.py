"""Storage: transient errors and retries, free space, atomic writes and hashes of files."""

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from etils import epath

from ldm_jax.runtime import reading
from ldm_jax.runtime.log import LOG

ATTEMPTS = 4
WAIT = 1.0  # seconds before the second attempt, doubled before each later one
TRANSIENT = frozenset(  # errors of a file system that often pass within seconds
    (
        *(errno.EIO, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ESTALE, errno.ENOLCK),
        *(errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.ENOTCONN),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH),
    )
)
# Messages of TensorStore, ArrayRecord and the clients of object stores, which have no common class.
# Status numbers count only after a word: a bare number may be part of a path, as checkpoints/500.
SAYS_SO = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|Input/output error|Stale file handle|Connection (reset|refused)"
    r"|temporarily unavailable|timed out|Too Many Requests|Internal Server Error|Bad Gateway"
    r"|Service Unavailable|Gateway Time-?out"
    r"|(HTTP|[Ss]tatus|[Cc]ode|[Ee]rror)( (response|status|error))?( code)?[:=]? ?(429|50[0234])\b"
)
FULL = re.compile(r"No space left on device|Disk quota exceeded")

T = TypeVar("T")


def retried(what: str | Callable[[], str], call: Callable[[], T]) -> T:
    """call(), repeated after transient errors: at most `ATTEMPTS` times in all.

    `what` (or `what()`) names the file in the line that announces each further attempt. The last
    error is raised as it is. For calls that one process makes alone, and that may be repeated.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            delay = WAIT * 2 ** (attempt - 1)
            LOG.warning(
                "%s: %s; attempt %d of %d follows in %g s",
                *(
                    what if isinstance(what, str) else what(),
                    reason(error),
                    attempt + 1,
                    ATTEMPTS,
                    delay,
                ),
            )
            time.sleep(delay)
    return call()


def is_transient(error: Exception) -> bool:
    """True for an error that a retry may cure; False for full storage, damaged or wrong files."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in TRANSIENT
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return SAYS_SO.search(f"{error} {error.__cause__ or ''}") is not None


def reason(error: BaseException) -> str:
    """Message of an error, in at most 200 characters of one line."""
    cause = error.__cause__
    full = FULL.search(f"{error} {cause or ''}")
    if full:
        return full.group()
    if cause is not None and "TensorStore details" in str(error):  # which are the cause
        return reason(cause)
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def free_bytes(path: str | os.PathLike) -> int | None:
    """Free bytes on the disk that `path` is or will be on; None for an object store."""
    if "://" in os.fspath(path):
        return None
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def not_written(path: str | os.PathLike, needed: int, why: str | Exception) -> str:
    """Text that `needed` bytes for `path` were not written, and how many bytes are free."""
    free = free_bytes(path)
    room = "" if free is None else f", {size(free)} are free"
    why = why if isinstance(why, str) else reason(why)
    return f"was not written ({why}); it takes about {size(needed)}{room}"


def size(count: float) -> str:
    """`count` bytes as text, as 3.2 GB."""
    if count < 1000:
        return f"{count:.0f} bytes"
    power = min(3, len(str(int(count))) // 3 - (len(str(int(count))) % 3 == 0))
    return f"{count / 1000**power:.1f} {('kB', 'MB', 'GB')[power - 1]}"


def write_whole(path: epath.Path, data: bytes, tag: str = "part") -> None:
    """Write a file under another name first: readers see all of it, or the former file.

    Two writers of one file at the same time need different tags.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{path.name}.{tag}"
    draft.write_bytes(data)
    draft.replace(path)


def sha256(path: str | os.PathLike) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with reading.opened(path) as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
