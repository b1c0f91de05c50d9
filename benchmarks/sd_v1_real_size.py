"""Stable Diffusion v1 at its real size: a single file is loaded, samples, and is written back.

    python benchmarks/sd_v1_real_size.py FOLDER --out benchmarks/results

FOLDER takes two files of 4.3 GB and is emptied of them at the end. The weights are random float32
by formula, made and written one tensor at a time, so nothing is downloaded. Loading, sampling and
writing are one process, whose memory is read from /proc (Linux). Writes OUT/sd_v1_real_size.md.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np

STEPS, SIZE, GUIDANCE = 2, 512, 7.5
IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def main() -> int:
    args = arguments()
    if args.child:
        print(json.dumps(load_sample_save(args.folder)))
        return 0
    args.folder.mkdir(parents=True, exist_ok=True)
    source, target = args.folder / "sd-v1.safetensors", args.folder / "back.safetensors"
    load_before = os.getloadavg()[0]
    try:
        began = time.perf_counter()
        names = write_source(source)
        wrote = time.perf_counter() - began
        command = [sys.executable, __file__, str(args.folder), "--child"]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        same = digest(source, names) == digest(target, names)
        sizes = source.stat().st_size, target.stat().st_size
    finally:
        for path in (source, target, target.with_suffix(".yaml")):
            path.unlink(missing_ok=True)
    text = report(found, same, sizes, wrote, load_before)
    (args.out / "sd_v1_real_size.md").write_text(text)
    print(text)
    return 0 if same else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for two files of 4.3 GB")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- the file ------------------------------------------------------------------------------------


def write_source(path: Path) -> list[str]:
    """The single file, with schedule buffers and position ids; names of the model's tensors."""
    from ldm_jax import bundle, schema
    from ldm_jax.convert import compvis, table
    from ldm_jax.convert.formats import safetensors_file

    text = schema.TextCondConfig(schema.CLIPTextConfig(), trainable=False)
    config = schema.LatentDiffusionConfig(cond=text, size=SIZE)  # the defaults are this model's
    model = bundle.build(config, {}, 0.18215)
    specs = table.to_torch(compvis.model_entries(model), compvis.model_shapes(model))
    names = list(specs)
    extra = {
        "betas": model.schedule.betas.astype(np.float32),
        "alphas_cumprod": model.schedule.alphas_cumprod.astype(np.float32),
        IDS: np.arange(77, dtype=np.int64)[None],
    }

    def arrays():
        for name in names:
            yield name, weight(name, specs[name].shape)
        yield from extra.items()

    safetensors_file.write_stream(path, specs | extra, arrays())
    return names


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor that belongs to a name and shape: activations stay of about unit size."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    value = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) < 2:
        return np.float32(0.1) * value + np.float32(name.endswith("weight"))
    return value / np.float32(np.sqrt(np.prod(shape[1:])))


def digest(path: Path, names: list[str]) -> str:
    """SHA-256 over the bytes of these tensors, their types and shapes."""
    from ldm_jax.convert.formats import safetensors_file

    tensors, total = safetensors_file.read(path), hashlib.sha256()
    for name in names:
        x = np.ascontiguousarray(tensors[name])
        total.update(f"{name} {x.dtype} {x.shape}".encode())
        total.update(x.reshape(-1).view(np.uint8))
    return total.hexdigest()


# --- the process that is measured ----------------------------------------------------------------


def load_sample_save(folder: Path) -> dict:
    """Figures of loading, sampling and writing: seconds, and bytes of resident memory."""
    import jax
    import jax.numpy as jnp

    from ldm_jax import conditioning, loading, sampling, saving

    jnp.zeros(1).block_until_ready()  # the backend's own memory belongs to the start
    start = resident("VmRSS")
    model, figures = measured(lambda: loading.load(folder / "sd-v1.safetensors"))
    leaves = jax.tree.leaves(model.params)
    found = {
        "start": start,
        "parameters": sum(x.size for x in leaves),
        "bytes": sum(x.nbytes for x in leaves),
        "load": figures,
    }
    tokens = np.random.default_rng(0).integers(0, 49406, (1, 77)).astype(np.int32)
    batch = {"tokens": tokens, "null_tokens": np.full((1, 77), 49407, np.int32)}
    sampler = sampling.make_sampler(model, shape=model.latent_shape, steps=STEPS)

    def sample(params, keys):
        stage = (model.config.cond, model.cond_stage, params["cond_stage"], batch)
        cond, null = conditioning.from_batch(*stage), conditioning.null_like(*stage)
        return sampler(params, cond, keys, null, GUIDANCE)

    keys = sampling.keys_of(0, np.arange(1))
    compiled, found["compile"] = measured(
        lambda: jax.jit(sample).lower(model.params, keys).compile()
    )
    image, found["sample"] = measured(lambda: np.asarray(compiled(model.params, keys)))
    assert image.shape == (1, SIZE, SIZE, 3), image.shape
    assert np.isfinite(image).all()
    found["image"] = [float(image.mean()), float(image.std())]
    target = folder / "back.safetensors"
    _, found["save"] = measured(lambda: saving.save(model, target, to="compvis"))
    return found


def measured(work):
    """(result, {"seconds", "peak": the largest resident memory while it ran})."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the largest value so far
    began = time.perf_counter()
    result = work()
    return result, {"seconds": time.perf_counter() - began, "peak": resident("VmHWM")}


def resident(field: str) -> int:
    """Bytes of this process by a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# --- the report ----------------------------------------------------------------------------------


def report(found: dict, same: bool, sizes: tuple[int, int], wrote: float, load: float) -> str:
    packages = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "flax", "numpy"))
    lines = [
        "# Stable Diffusion v1 at its real size",
        "",
        "`python benchmarks/sd_v1_real_size.py FOLDER`."
        f" {datetime.date.today()}, {processor()}, {os.cpu_count()} cores, CPU, float32,"
        f" Python {platform.python_version()}, {packages}; load average at the start {load:.1f}.",
        "",
        f"UNet, first stage and CLIP text encoder: {found['parameters'] / 1e6:.2f} M parameters,"
        f" {found['bytes'] / 1e9:.3f} GB, random float32. The file has {sizes[0] / 1e9:.3f} GB and"
        " no YAML beside it; the file written back has"
        f" {sizes[1] / 1e9:.3f} GB. Making the file took {wrote:.0f} s.",
        "",
        "| | seconds | peak memory, GB | above the start, over the parameters |",
        "| --- | --- | --- | --- |",
    ]
    titles = {
        "load": "load, from a file that was just written",
        "compile": "compile the sampler",
        "sample": f"{STEPS} DDIM steps at {SIZE}x{SIZE}, guidance {GUIDANCE}, and decode",
        "save": "write back, with the YAML",
    }
    for key, title in titles.items():
        seconds, peak = found[key]["seconds"], found[key]["peak"]
        ratio = (peak - found["start"]) / found["bytes"]
        lines.append(f"| {title} | {seconds:.1f} | {peak / 1e9:.2f} | {ratio:.3f} |")
    mean, std = found["image"]
    lines += [
        "",
        f"The process held {found['start'] / 1e9:.2f} GB at the start (imports, JAX's backend)."
        f" The image is finite (mean {mean:.3f}, standard deviation {std:.3f}).",
        f"SHA-256 over all tensors, their names, types and shapes: {'equal' if same else 'DIFFERS'}"
        " in both files.",
        "",
    ]
    return "\n".join(lines)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(": ")[1] for x in lines if x.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    sys.exit(main())
