"""What every command shares: one-line errors, distinct exit codes, the compilation cache."""

import argparse
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from ldm_jax.runtime import cluster, log

CLEAR = (ValueError, OSError, FloatingPointError, ImportError)  # carry a message made for people
INTERRUPTED = 75  # EX_TEMPFAIL: stopped by SIGTERM or Ctrl-C, saved, and can be resumed
UNREAD = 141  # 128 + SIGPIPE: whoever read stdout left, as `| head` does


def run(program: str, command: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run a command with its log on stderr; return its exit code.

    An error is one line on stderr, with --debug a traceback.
    """
    argv = list(argv)
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    if not debug:
        _hide_tracebacks()
    try:
        try:
            with log.shown():
                return command(argv) or 0
        finally:
            sys.stdout.flush()  # not only at exit, where a reader that left cannot be caught
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted\n")
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_stdout():
            return UNREAD
        if debug:
            raise
        text = " ".join(str(error).split()) or "no message"
        # RuntimeError itself is ours; its subclasses are not
        clear = isinstance(error, CLEAR) or type(error) is RuntimeError
        kind, hint = ("", "") if clear else (f"{type(error).__name__}: ", " (--debug shows where)")
        who = f"process {jax.process_index()}: " if jax.distributed.is_initialized() else ""
        sys.stderr.write(f"{who}{program}: error: {kind}{text}{hint}\n")
        return 1


def _nobody_reads_stdout() -> bool:
    """Whether stdout is the pipe that broke; if so, what is left for it goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    broken = any(event & select.POLLERR for _, event in poll.poll(0))
    if broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return broken


def _hide_tracebacks() -> None:
    """When one file of a checkpoint cannot be read, Orbax drops its other reads, and Python prints
    a traceback for each beside our one line; when one cannot be written, Orbax prints five."""
    logging.getLogger("absl").addFilter(
        lambda record: not (record.exc_info and "orbax" in record.pathname)
    )
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            show(unraisable)

    sys.unraisablehook = hook


def enable_compilation_cache(argv: Sequence[str]) -> list[str]:
    """Keeps compiled programs on disk between runs; `--no-compilation-cache` turns it off.

    Returns argv without the flag. The folder is JAX_COMPILATION_CACHE_DIR, or ldm_jax under the
    user's cache folder.
    """
    rest = [a for a in argv if a != "--no-compilation-cache"]
    if len(rest) == len(argv):
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ldm_jax" / "xla"
        path = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache))
        jax.config.update("jax_compilation_cache_dir", path)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)
    return rest


def join_processes(argv: Sequence[str]) -> list[str]:
    """Joins the processes of a cluster, if this is one of several; returns argv without the flag.

    Without a flag, what `cluster.find` sees in the environment: Cloud TPU, SLURM, Open MPI,
    Kubernetes. `--distributed ADDRESS:PORT,PROCESSES,INDEX` says it; `--distributed` alone insists
    on several; `--distributed off` runs alone.
    """
    rest, value, given = list(argv), None, "--distributed" in argv
    if given:
        at = rest.index("--distributed")
        value = rest[at + 1] if at + 1 < len(rest) and not rest[at + 1].startswith("-") else None
        del rest[at : at + (1 if value is None else 2)]
    if value == "off":
        return rest
    place = cluster.parse(value) if value else cluster.find()
    if place is None and given:
        raise ValueError(
            "--distributed: no launcher of several processes is seen in the environment"
            " (Cloud TPU, SLURM, Open MPI, Kubernetes); give ADDRESS:PORT,PROCESSES,INDEX"
        )
    if place is not None:
        cluster.join(place)
    return rest


def split_task(argv: Sequence[str], program: str, names: Sequence[str]) -> tuple[str, list[str]]:
    """As `split_first` for one of some tasks. ValueError for another name."""
    listed = ", ".join(names)
    name, rest = split_first(argv, program, "TASK", f"one of {listed}")
    if name not in names:
        raise ValueError(f"task {name!r} is not one of {listed}")
    return name, rest


def split_first(
    argv: Sequence[str], program: str, name: str, choices: str
) -> tuple[str, list[str]]:
    """The first positional argument and the rest; without one, usage on stderr and exit code 2."""
    if argv and not argv[0].startswith("-"):
        return argv[0], list(argv[1:])
    parser = argparse.ArgumentParser(program, usage=f"{program} {name} [options]")
    parser.epilog = f"{name} is {choices}. With it, --help lists every option."
    if argv and argv[0] in ("-h", "--help"):
        sys.stdout.write(parser.format_help())
        raise SystemExit(0)
    parser.error(f"the first argument is {name}: {choices}; --help lists options")
