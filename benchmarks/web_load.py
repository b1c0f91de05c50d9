"""Load on `ldm-web`: many clients at once, and the bare command beside it.

    python benchmarks/web_load.py --model runs/demo/ldm

Writes benchmarks/results/web_load.md: what clients were told, memory at the minutes, pictures of a
seed whoever asked, throughput beside that of `ldm-sample` at the same batch, the first picture
after a start, and what a SIGTERM under load leaves.
"""

import argparse
import asyncio
import base64
import collections
import hashlib
import io
import json
import os
import pathlib
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

import httpx
import jax
from PIL import Image

SEEDS = 16
RESULT = pathlib.Path(__file__).parent / "results" / "web_load.md"


def start(model: str, *more: str) -> tuple[subprocess.Popen, str, float]:
    """(process, address, seconds until it answers) of a server."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "ldm_jax.sample.web.main", "--model", model, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--api-only", *more], stderr=subprocess.PIPE, text=True, bufsize=1
    )
    for line in process.stderr:
        found = re.search(r"http://127\.0\.0\.1:\d+/", line)
        if found:
            return process, found[0], time.perf_counter() - began
    raise RuntimeError("the server ended")


def resident(process: subprocess.Popen) -> float:
    """Megabytes."""
    pages = int(pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def asked(arguments: argparse.Namespace, seed: int) -> dict:
    return {
        "prompt": arguments.prompt, "seed": seed, "steps": arguments.steps, "cfg_scale": 2,
        "batch_size": arguments.batch, "sampler_name": "DDIM",
    }  # fmt: skip


def bare(arguments: argparse.Namespace, out: pathlib.Path) -> tuple[float, float]:
    """(pictures per second of the command without its start, seconds of its shorter run)."""
    took = []
    counts = [arguments.batch * n for n in arguments.bare]
    for count in counts:
        began = time.perf_counter()
        subprocess.run(
            [
                *(sys.executable, "-m", "ldm_jax.sample.main", arguments.task),
                *("--model", arguments.model, "--out", out / str(count)),
                *("--num-images", str(count)),
                *(arguments.flag, arguments.prompt, "--steps", str(arguments.steps)),
                *("--batch-size", str(arguments.batch), "--guidance-scale", "2"),
                *("--noise-source", "nv"),
            ],
            check=True, capture_output=True,
        )  # fmt: skip
        took.append(time.perf_counter() - began)
    return (counts[1] - counts[0]) / (took[1] - took[0]), took[0]


async def load(arguments: argparse.Namespace, address: str, process: subprocess.Popen) -> dict:
    """What clients were told in some seconds."""
    told: collections.Counter = collections.Counter()
    pictures = collections.defaultdict(set)
    waits, memory = [], {}
    end = time.perf_counter() + arguments.seconds

    async def ask(number: int) -> None:
        async with httpx.AsyncClient(base_url=address, timeout=600) as client:
            turn = number
            while time.perf_counter() < end:
                seed, turn = turn % SEEDS, turn + 1
                began = time.perf_counter()
                answer = await client.post("sdapi/v1/txt2img", json=asked(arguments, seed))
                told[answer.status_code] += 1
                if answer.status_code != 200:
                    await asyncio.sleep(0.2)
                    continue
                waits.append(time.perf_counter() - began)
                for i, text in enumerate(answer.json()["images"]):
                    with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
                        pictures[seed + i].add(hashlib.sha256(picture.tobytes()).hexdigest())

    async def watch() -> None:
        began, minute = time.perf_counter(), 0
        while time.perf_counter() < end:
            await asyncio.sleep(1)
            if time.perf_counter() - began >= 60 * (minute + 1) - 1:
                minute += 1
                memory[minute] = resident(process)

    began = time.perf_counter()
    await asyncio.gather(watch(), *(ask(i) for i in range(arguments.clients)))
    return {
        "told": dict(told),
        "rate": told[200] * arguments.batch / (time.perf_counter() - began),
        "pictures": {seed: len(kinds) for seed, kinds in pictures.items()},
        "wait": statistics.median(waits),
        "memory": memory,
    }


async def ended(arguments: argparse.Namespace, out: pathlib.Path) -> str:
    """What a SIGTERM under load leaves."""
    process, address, _ = start(arguments.model, "--out", str(out))
    codes: collections.Counter = collections.Counter()

    async def ask(number: int) -> None:
        async with httpx.AsyncClient(base_url=address, timeout=600) as client:
            try:
                given = asked(arguments, number) | {"save_images": True}
                codes[(await client.post("sdapi/v1/txt2img", json=given)).status_code] += 1
            except httpx.HTTPError as error:
                codes[type(error).__name__] += 1

    async def stop() -> float:
        while not any(out.rglob("*.png")):
            await asyncio.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        began = time.perf_counter()
        while process.poll() is None:
            await asyncio.sleep(0.05)
        return time.perf_counter() - began

    took, *_ = await asyncio.gather(stop(), *(ask(i) for i in range(arguments.clients)))
    files = [path for path in out.rglob("*") if path.is_file()]
    whole = sum(bool(Image.open(path).info["parameters"]) for path in files)
    return (
        f"exit code {process.returncode} after {took:.1f} s; clients were told {dict(codes)};"
        f" {len(files)} files, {whole} of them whole pictures with their text"
    )


def first(arguments: argparse.Namespace) -> str:
    """Seconds to the first picture, its programs in the compilation cache."""
    process, address, ready = start(arguments.model)
    began = time.perf_counter()
    request = urllib.request.Request(
        f"{address}sdapi/v1/txt2img",
        json.dumps(asked(arguments, 0)).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request).read()
    drawn = time.perf_counter() - began
    process.terminate()
    process.wait()
    return f"answers after {ready:.1f} s, and the first request {drawn:.1f} s later"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", default="class2img")
    parser.add_argument("--flag", default="--labels", help="of the task, for the prompt")
    parser.add_argument("--prompt", default="3")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bare", type=int, nargs=2, default=(1, 61), help="batches of the command")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder)
        one = first(arguments)
        again = first(arguments)
        process, address, _ = start(arguments.model)
        rates = [bare(arguments, out / "before")]
        found = asyncio.run(load(arguments, address, process))
        process.terminate()
        process.wait()
        rates.append(bare(arguments, out / "after"))
        end = asyncio.run(ended(arguments, out / "ended"))
    command = statistics.mean(rate for rate, _ in rates)
    shown = ", ".join(f"{rate:.2f}" for rate, _ in rates)
    least = f"`ldm-sample` of {arguments.bare[0]} batches: {min(took for _, took in rates):.1f} s"
    memory = ", ".join(f"minute {minute} {mb:.0f} MB" for minute, mb in found["memory"].items())
    kinds = collections.Counter(found["pictures"].values())
    lines = [
        "# Load on the server",
        "",
        f"`{' '.join(['python benchmarks/web_load.py', *sys.argv[1:]])}`: {arguments.clients}"
        f" clients at once for {arguments.seconds} s, each asks for {arguments.batch} pictures of"
        f" {arguments.steps} steps of DDIM, guidance 2, and asks again when it has them."
        f" {platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}, jax"
        f" {jax.__version__}, {time.strftime('%B %Y')}.",
        "",
        "| | |",
        "| --- | --- |",
        f"| answers by status | {found['told']} |",
        f"| resident memory | {memory} |",
        f"| pictures of a seed, whoever asked | {dict(kinds)} ({{kinds of pixels: seeds}}) |",
        f"| median wait of a client | {found['wait']:.1f} s |",
        f"| pictures/s | {found['rate']:.2f} |",
        f"| pictures/s of `ldm-sample`, before and after | {shown} |",
        f"| server / command | {found['rate'] / command:.3f} |",
        f"| first picture after a start, then once more | {one}; {again}; {least} |",
        f"| SIGTERM under load | {end} |",
    ]
    RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
