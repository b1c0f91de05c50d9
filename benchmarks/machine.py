"""What a reader needs to judge figures or to repeat them: the same in every report."""

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path


def facts() -> dict:
    """When, by which command, of which commit, on which processor and Python."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit.stdout.strip(),
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }
