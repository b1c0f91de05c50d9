"""Parts of every command: one-line errors, exit codes, the first argument, cache and cluster."""

import functools
import importlib.metadata
import logging
import os
import select
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ldm_jax.runtime import cluster, flags, interrupts, log, progress

# errors whose message is one line for the user
CLEAR = (ValueError, OSError, FloatingPointError, ImportError)
INTERRUPTED = 75  # EX_TEMPFAIL: stopped by SIGTERM or Ctrl-C, saved, and can be resumed
WAITS = (
    "interrupted: ends when what is being compiled or computed is done; Ctrl-C again ends at once"
)
UNREAD = 141  # 128 + SIGPIPE: the reader of stdout has closed it, as `| head` does


def run(program: str, command: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run a command with its log on stderr; return its exit code.

    An error is one line on stderr, with --debug a traceback; --version prints versions instead.
    """
    common, _ = flags.parse_known(argv, program, flags.Common)
    if common.version:
        command = functools.partial(_print_version, program)
    if not common.debug:
        _hide_tracebacks()
    try:
        try:
            with log.shown(), interrupts.answered(WAITS, after=0.5):
                return command(argv) or 0
        finally:
            sys.stdout.flush()  # not only at exit: a broken pipe cannot be caught there
    except KeyboardInterrupt:
        progress.close_all()
        echoed = "\r" if sys.stderr.isatty() else ""  # over the terminal's ^C
        sys.stderr.write(f"{echoed}{program}: interrupted\n")
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_stdout():
            return UNREAD
        progress.close_all()
        if common.debug:
            raise
        text = " ".join(str(error).split()) or "no message"
        # RuntimeError itself is ours; its subclasses are not
        clear = isinstance(error, CLEAR) or type(error) is RuntimeError
        kind, hint = ("", "") if clear else (f"{type(error).__name__}: ", " (--debug shows where)")
        who = f"process {jax.process_index()}: " if jax.distributed.is_initialized() else ""
        sys.stderr.write(f"{who}{program}: error: {kind}{text}{hint}\n")
        return 1


def _print_version(program: str, argv: Sequence[str]) -> None:
    del argv
    sys.stdout.write(f"{program} {importlib.metadata.version('ldm-jax')} (jax {jax.__version__})\n")


def _nobody_reads_stdout() -> bool:
    """True if stdout is the broken pipe; the rest of the output then goes to /dev/null."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    broken = any(event & select.POLLERR for _, event in poll.poll(0))
    if broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return broken


def _hide_tracebacks() -> None:
    """Silence tracebacks printed beside our one line of an error.

    When one file of a checkpoint cannot be read, Orbax drops its other reads and Python prints a
    traceback for each; when one cannot be written, Orbax prints five.
    """
    logging.getLogger("absl").addFilter(
        lambda record: not (record.exc_info and "orbax" in record.pathname)
    )
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            show(unraisable)

    sys.unraisablehook = hook


def start(process: flags.Process) -> None:
    """Set the compilation cache up and join the processes of a cluster, as the options say."""
    if process.compilation_cache:
        enable_compilation_cache()
    join_processes(process.distributed)


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk between runs.

    The folder is JAX_COMPILATION_CACHE_DIR, or ldm_jax under the user's cache folder.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ldm_jax" / "xla"
    path = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache))
    jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)


def join_processes(place: str | None = None) -> None:
    """Join the processes of a cluster, if this is one of several.

    place: ADDRESS:PORT,PROCESSES,INDEX; "off": run alone; None: as `cluster.find` sees it in the
    environment (Cloud TPU, SLURM, Open MPI, Kubernetes); "auto": the same, but insist on several.
    """
    if place == "off":
        return
    placed = cluster.find() if place in (None, "auto") else cluster.parse(place)
    if placed is None and place == "auto":
        raise ValueError(
            "--distributed: no launcher of several processes is seen in the environment"
            " (Cloud TPU, SLURM, Open MPI, Kubernetes); give ADDRESS:PORT,PROCESSES,INDEX"
        )
    if placed is not None:
        cluster.join(placed)


def split_task(
    argv: Sequence[str], program: str, usage: str, description: str, tasks: Mapping[str, type]
) -> tuple[str, list[str]]:
    """As `split_first` for one of some tasks; ValueError for another name.

    tasks: {name: dataclass of its options}.
    """

    def listed() -> dict[str, dict[str, str]]:
        return {"TASK": {name: flags.summary(kind.__doc__) for name, kind in tasks.items()}}

    name, rest = split_first(argv, program, f"TASK {usage}", description, listed)
    if name not in tasks:
        raise ValueError(f"task {name!r} is not one of {', '.join(tasks)}")
    return name, rest


def split_first(
    argv: Sequence[str],
    program: str,
    usage: str,
    description: str,
    choices: Callable[[], Mapping[str, Mapping[str, str]]],
) -> tuple[str, list[str]]:
    """Split the first argument from the others; without one, print the choices.

    For --help that goes to stdout with exit code 0, else to stderr with exit code 2.
    choices: {heading: {choice: a line about it}}, made only to be printed.
    """
    if argv and not argv[0].startswith("-"):
        return argv[0], list(argv[1:])
    name = usage.split()[0]
    lines = [f"usage: {program} {usage}", "", " ".join(description.split())]
    for heading, described in choices().items():
        width = max(map(len, described)) + 2
        lines += ["", f"{heading}:"]
        lines += [f"  {choice:{width}}{line}" for choice, line in described.items()]
    lines += ["", f"{program} {name} --help lists every option; {program} --version, the versions."]
    text = "\n".join(lines) + "\n"
    if argv and argv[0] in ("-h", "--help"):
        sys.stdout.write(text)
        raise SystemExit(0)
    sys.stderr.write(f"{text}\n{program}: error: the first argument is {name}\n")
    raise SystemExit(2)
