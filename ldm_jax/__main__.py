"""The commands without their scripts: `python -m ldm_jax train ...` is `ldm-train ...`."""

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

COMMANDS = {
    "train": "ldm_jax.train.entry",
    "sample": "ldm_jax.sample.main",
    "eval": "ldm_jax.sample.evaluate.main",
    "convert": "ldm_jax.sample.convert",
}


def main() -> None:
    """Run the command that the first argument names; list the commands without one."""
    name, *rest = sys.argv[1:] or [""]
    if name in COMMANDS:
        sys.argv = [f"ldm-{name}", *rest]
        importlib.import_module(COMMANDS[name]).main()
    elif name == "--version":
        import ldm_jax

        sys.stdout.write(f"ldm_jax {ldm_jax.__version__}\n")
    elif name in ("-h", "--help"):
        sys.stdout.write(usage())
    else:
        complaint = f"{name!r} is not a command" if name else "a command is missing"
        sys.stderr.write(f"{usage()}\npython -m ldm_jax: error: {complaint}\n")
        sys.exit(2)


def usage() -> str:
    """Lines that name the commands, each with the first line of its module."""
    lines = ["usage: python -m ldm_jax COMMAND ...", "", "COMMAND:"]
    for name, module in COMMANDS.items():  # read, not imported: that would take seconds
        source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
        about = ast.get_docstring(ast.parse(source)).partition("\n")[0]
        lines.append(f"  {name:9}{about}")
    lines += ["", "COMMAND --help lists what it takes; `ldm-COMMAND` is the same command."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
