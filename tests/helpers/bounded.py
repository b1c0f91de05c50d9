"""Readers under limits of time and memory, which a hostile file may exceed in one call of C."""

import json
import os
import subprocess
import sys

SECONDS = 20
"""Of a processor, for a file of at most a few hundred kB on a slow machine; attacks take hours."""
MEMORY = 2**30
"""Bytes of address space beside what the interpreter has."""

CHILD = """
import json, os, resource, sys
{imports}
seconds, memory, paths = json.loads(sys.argv[1])
for path in paths:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        with open("/proc/self/statm") as statm:
            now = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
        try:
            {read}
            said = "read"
        except ValueError as error:
            said = str(error)
        except BaseException as error:
            said = "not a ValueError: " + type(error).__name__ + " " + str(error)[:200]
        print(json.dumps([path, said]), flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        print(json.dumps([path, f"not read: ended with status {{status}}"]), flush=True)
"""


def read_all(imports: str, read: str, paths, memory: int = MEMORY) -> dict[str, str]:
    """{path: "read", or what the refusal says}; `read` is a statement about `path`."""
    code = CHILD.format(imports=imports, read=read)
    argument = json.dumps([SECONDS, memory, [os.fspath(path) for path in paths]])
    command = [sys.executable, "-c", code, argument]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(map(json.loads, done.stdout.splitlines()))
