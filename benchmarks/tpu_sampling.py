"""Stable Diffusion v1's UNet on TPU v5e 4x4, compiled here without the TPU: memory, FLOPs, time.

    pip install --no-deps 'libtpu==0.0.42.*' # the one that belongs to jaxlib 0.10.2
    pip install --no-deps --target FORMER 'diffusers==0.35.2' # the last with Flax
    python benchmarks/tpu_sampling.py --out benchmarks/results --former FORMER

bfloat16 at 512x512, 8 images per chip: batch 8 without guidance; 8:16 with, as `make_sampler`
calls it (8 rows of x, 16 of the context); 16 as two halves that share nothing. With --former also
diffusers' former Flax UNet, as it was called by default. Data parallel on 16 chips; nothing runs on
one. Each program is compiled in its own process, minutes each, because large attention logits can
crash the compiler; its text stays in --keep and is read from there the next time. Rows of
OUT/tpu_sampling.md that are not asked for stay as they are. How time is estimated:
`ldm_jax/tpu_cost.py`. Writes OUT/tpu_sampling.md.
"""

import argparse
import datetime
import gzip
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from ldm_jax.cost import flops, tpu_cost

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
CHIP, CHIPS, TOPOLOGY = tpu_cost.CHIPS["v5e"], 16, "v5e:4x4"
FORMER = "former"
"""In the place of an attention's name: diffusers' Flax UNet with its default, plain attention."""
SOURCES = ("cycles", "kernels", "sentinels", "copies", "collectives")


def main() -> int:
    args = arguments()
    if args.child:
        compile_case(args.child[0], args.child[1], Path(args.child[2]), args.former)
        return 0
    args.keep.mkdir(parents=True, exist_ok=True)
    cases = [(batch, name) for batch in args.batches for name in args.attention]
    if args.former is not None:  # it has no rows of x apart from those of the context
        cases += [(batch, FORMER) for batch in args.batches if ":" not in batch]
    rows = [run_case(*case, args.keep, args.former) for case in cases]
    path = args.out / "tpu_sampling.md"
    text = report(rows, path.read_text() if path.exists() else "")
    path.write_text(text)
    print(text)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--keep", type=Path, default=Path("runs/tpu_sampling"))
    parser.add_argument(
        "--batches", nargs="+", default=["8", "16", "8:16"], help="rows per chip, of x:context"
    )
    parser.add_argument("--attention", nargs="+", default=["xla", "flash"])
    parser.add_argument("--former", type=Path, help="folder of a diffusers with Flax, 0.35.2")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- one process per program ---------------------------------------------------------------------


def run_case(batch: str, name: str, keep: Path, former: Path | None) -> dict:
    """What the compiler says of one program, or how it ended."""
    path = keep / f"unet_{name}_{batch.replace(':', '_')}"
    about = path.with_suffix(".json")
    if not about.exists():
        command = [sys.executable, __file__, "--child", batch, name, str(path)]
        command += [] if former is None else ["--former", str(former)]
        with path.with_suffix(".log").open("w") as log:
            done = subprocess.run(
                command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log, check=False
            )
        if done.returncode:
            ended = f"exit code {done.returncode}"
            if done.returncode < 0:
                ended = signal.Signals(-done.returncode).name
            about.write_text(json.dumps({"attention": name, "failed": ended}))
    at = datetime.date.fromtimestamp(about.stat().st_mtime)
    found = json.loads(about.read_text()) | {"batch": batch, "attention": name, "at": at}
    if "failed" not in found:
        found["text"] = gzip.decompress(path.with_suffix(".txt.gz").read_bytes()).decode()
    return found


def repeat_for(batch: str) -> tuple[int, int]:
    """Rows of x and of the context."""
    x, _, context = batch.partition(":")
    return int(x), int(context or x)


def compile_case(batch: str, name: str, path: Path, former: Path | None) -> None:
    """Compiles the UNet; writes PATH.txt.gz and PATH.json."""
    import jax

    case = unet_case
    if name == FORMER:
        sys.path.insert(0, str(former))
        case = former_case
    function, shapes = case(batch, name)
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*shapes).compile()
    memory = compiled.memory_analysis()
    plain, _ = case(batch, "xla")
    about = {
        "attention": name,
        "seconds": time.perf_counter() - began,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "operations": flops.count(jax.make_jaxpr(plain)(*shapes)) / CHIPS,
        "kernels": [
            [kernel, shapes_of, operations]
            for kernel, calls in flops.kernels(jax.make_jaxpr(function)(*shapes)).items()
            for shapes_of, operations in calls.items()
        ],
    }
    path.with_suffix(".txt.gz").write_bytes(gzip.compress(compiled.as_text().encode()))
    path.with_suffix(".json").write_text(json.dumps(about))


def unet_case(batch: str, name: str):
    """The UNet's forward pass and the shapes it is compiled for, so many rows on every chip."""
    import jax
    import jax.numpy as jnp

    from ldm_jax import schema
    from ldm_jax.models import attention, unet

    mesh = mesh_of_chips()
    net = unet.from_config(
        schema.LatentDiffusionConfig().unet,  # the defaults are Stable Diffusion v1
        dtype=jnp.bfloat16,
        attention=attention.choose("tpu", mesh, name),
    )
    variables = jax.eval_shape(net.init, jax.random.key(0), *unet.example_inputs(net))
    shapes = shapes_of(mesh, variables["params"], batch, (64, 64, 4))
    return lambda params, x, t_b, context: net.apply({"params": params}, x, t_b, context), shapes


def former_case(batch: str, name: str):
    """As `unet_case`, for the UNet of diffusers' Flax pipelines; `name` changes nothing."""
    import jax
    import jax.numpy as jnp
    from diffusers import FlaxUNet2DConditionModel

    del name
    net = FlaxUNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, dtype=jnp.bfloat16
    )  # its other defaults are Stable Diffusion v1 too
    params = jax.eval_shape(net.init_weights, jax.random.key(0))
    shapes = shapes_of(mesh_of_chips(), params, batch, (4, 64, 64))
    return lambda params, *inputs: net.apply({"params": params}, *inputs).sample, shapes


def mesh_of_chips():
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    return Mesh(np.array(devices), ("data",))


def shapes_of(mesh, params, batch: str, latent: tuple[int, ...]):
    """Shapes of (params, x, t_b, context), each chip with its rows of the batch."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    def shape(dims, dtype, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    rows, contexts = (n * mesh.size for n in repeat_for(batch))
    return (
        jax.tree.map(lambda x: shape(x.shape, jnp.bfloat16), params),
        shape((rows, *latent), jnp.bfloat16, "data"),
        shape((rows,), jnp.int32, "data"),
        shape((contexts, 77, 768), jnp.bfloat16, "data"),
    )


# --- the report ----------------------------------------------------------------------------------


def report(rows: list[dict], before: str) -> str:
    """The page: `rows`, and those of the page `before` that are not among them."""
    packages = ("jax", "jaxlib", "libtpu", "flax")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    table, details = entries(before)
    for row in rows:
        key = row["batch"], row["attention"]
        if "failed" in row:
            failed = f"the compiler ended with {row['failed']}"
            table[key] = f"| {key[0]} | {key[1]} | {failed} | | | | | | {row['at']} |"
            details.pop(key, None)  # those of an older program that did compile
            continue
        found = tpu_cost.estimate(row["text"], CHIP, kernels_of(row))
        table[key], details[key] = table_row(row, found), detail(row, found)
    lines = [
        "# Stable Diffusion v1 on TPU v5e, estimated",
        "",
        f"`python benchmarks/tpu_sampling.py`, {datetime.date.today()}, Python"
        f" {platform.python_version()}, {versions}. No TPU took part.",
        "",
        f"One forward pass of the UNet in bfloat16, compiled for {TOPOLOGY}, data parallel, at"
        " 512x512 (latents 64x64x4, 77 tokens). Batch 8 per chip is 8 images without guidance, 8:16"
        " with (8 rows of x, 16 of the context, so that what is before the first cross-attention is"
        " computed once), 16 with two halves that share nothing. `former` is the Flax UNet of"
        f" diffusers 0.35.2 with its default attention. A chip: {CHIP.operations / 1e12:.0f}"
        f" TFLOP/s, {CHIP.memory_bandwidth / 1e9:.0f} GB/s, {CHIP.memory / 1e9:.0f} GB,"
        f" {CHIP.clock / 1e9} GHz.",
        "",
        "| batch per chip | attention | ms | MFU | GFLOP per row of x"
        " | HBM, GB (arguments + temporary) | ms by source | hidden copies, ms | compiled |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *table.values(),
        "",
        *over_former(table),
        "FLOPs: of the jaxpr with plain attention, 2 per multiply-add. Time: `estimated_cycles` of"
        " every op over the clock, loop bodies as often as they run; ops without (kernels,"
        " sentinels, copies) at the larger of executed operations (padding included) over the peak"
        f" and bytes over HBM bandwidth, over {tpu_cost.EFFICIENCY}; collectives at a ring over one"
        f" link of {CHIP.link_bandwidth / 1e9:.0f} GB/s. Copies that run beside other ops are in no"
        " sum.",
    ]
    return "\n".join([*lines, *(line for part in details.values() for line in part), ""])


def entries(page: str) -> tuple[dict, dict]:
    """({(batch, attention): row of the table}, {the same: lines of its details}) of a page."""
    table = {m.groups(): m[0] for m in re.finditer(r"^\| ([\d:]+) \| (\w+) \|.*$", page, re.M)}
    details = {}
    for part in re.split(r"\n(?=\nBatch )", page)[1:]:
        key = tuple(re.match(r"\nBatch ([\d:]+), `(\w+)`", part).groups())
        details[key] = part.removesuffix("\n").split("\n")
    return table, details


def over_former(table: dict[tuple[str, str], str]) -> list[str]:
    """How many times as fast as the former UNet with as many rows of the context."""
    ms = {}
    for key, line in table.items():
        if found := re.match(r"[\d.]+$", line.split("|")[3].strip()):
            ms[key] = float(found[0])
    ratios = [
        f"{ms[former] / ms[key]:.2f} times as fast at {key[0]} ({key[1]})"
        for key in ms
        if key[1] != FORMER and (former := (key[0].rpartition(":")[2], FORMER)) in ms
    ]
    return [f"Over the former UNet: {', '.join(ratios)}.", ""] if ratios else []


def kernels_of(row: dict) -> dict[str, dict]:
    kernels: dict[str, dict] = {}
    for name, shapes, operations in row["kernels"]:
        kernels.setdefault(name, {})[tuple(map(tuple, shapes))] = operations
    return kernels


def table_row(row: dict, found: tpu_cost.Estimate) -> str:
    shares = found.shares()
    sources = ", ".join(
        f"{source} {1e3 * found.seconds * shares[source]:.1f}"
        for source in SOURCES
        if source in shares
    )
    return (
        f"| {row['batch']} | {row['attention']} | {1e3 * found.seconds:.1f}"
        f" | {100 * found.utilization(row['operations'], CHIP):.1f} %"
        f" | {row['operations'] / repeat_for(row['batch'])[0] / 1e9:.1f}"
        f" | {row['arguments'] / 1e9:.2f} + {row['temporaries'] / 1e9:.2f}"
        f" | {sources} | {1e3 * found.hidden_copies:.1f} | {row['at']} |"
    )


def detail(row: dict, found: tpu_cost.Estimate) -> list[str]:
    """Where the time goes, by part of the model and kind of op; what could not be charged."""
    parts: dict[str, float] = {}
    for charge in found.charges:
        part = kind(charge)
        parts[part] = parts.get(part, 0) + charge.seconds
    lines = [
        "",
        f"Batch {row['batch']}, `{row['attention']}`, compiled in {row['seconds'] / 60:.0f} min;"
        " by what an op is made for:",
        "",
        "| | ms |",
        "| --- | --- |",
    ]
    for part, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        lines.append(f"| {part} | {1e3 * seconds:.2f} |")
    for title, names in (
        ("loops counted once", found.unknown_loops),
        ("kernels counted by bytes alone", found.unknown_kernels),
    ):
        if names:
            lines += ["", f"Not known, {title}: {', '.join(sorted(set(names)))}."]
    return lines


def kind(charge: tpu_cost.Charge) -> str:
    """A line of the table, by the path in the model that the compiler kept."""
    scope = charge.op.scope
    kinds = {
        "online-softmax": "attention: the compiler's own kernels",
        "attn1/": "self-attention",
        "attn2/": "cross-attention",
        "/ff/": "feed-forward",
        "conv_general_dilated": "convolutions",
        "norm": "norms",
        "time_emb": "time embedding",
    }
    found = next((title for key, title in kinds.items() if key in scope), "rest")
    if found.endswith("attention") and any(f"to_{x}" in scope for x in ("q", "k", "v", "out")):
        return f"{found}: projections"
    return found if scope else "copies without a name"


if __name__ == "__main__":
    sys.exit(main())
