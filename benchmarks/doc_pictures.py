"""Pictures of pages of docs/, each by name: `python benchmarks/doc_pictures.py augmentation mesh`.

Without names: all of them. `convert` and `python` draw with the model of `make demo` in runs/demo;
`resumed` trains tiny models for some minutes.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # of `mesh`

import argparse
import dataclasses
import gzip
import itertools
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

import ldm_jax
from ldm_jax import data, schema, sharding, solvers
from ldm_jax.runtime import checkpoint, images, rundir

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
DEMO = Path("runs/demo/ldm")


def save(figure: plt.Figure, name: str) -> None:
    """Write it with few colours, which keeps it small."""
    figure.savefig(PICTURES / f"{name}.png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    with Image.open(PICTURES / f"{name}.png") as image:
        few = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    few.save(PICTURES / f"{name}.png", optimize=True)


def augmentation() -> None:
    """Three photos of scikit-image: cut at the centre, and as seven epochs see them."""
    from skimage import data as photos

    with tempfile.TemporaryDirectory() as folder:
        for name in ("astronaut", "chelsea", "coffee"):
            Image.fromarray(getattr(photos, name)()).save(f"{folder}/{name}.png")
        source = schema.FolderConfig(folder, eval_path=folder)
        config = schema.DataConfig(
            source=source, size=96, crop="random", crop_range=(0.5, 1.0), flip=True, shuffle=False
        )
        cut = data.stream(config, batch_size=3, seed=0, split="eval")
        seen = data.stream(config, batch_size=3, seed=0)
        rows = []
        for i in range(3):
            rows += [cut[i]["image"], *(seen[i + 3 * epoch]["image"] for epoch in range(7))]
    sheet = Image.fromarray(images.grid(images.to_uint8(np.stack(rows)), columns=8, scale=1))
    sheet.quantize(200).save(PICTURES / "augmentation.png", optimize=True)


def held(array: str, shape: tuple[int, ...], made: jax.sharding.Mesh) -> dict[tuple, list[int]]:
    """{(rows, columns): numbers of the devices that hold them} of the last two axes."""
    if array == "batch":
        split = sharding.batch_sharding(made)
    else:
        tree = jax.ShapeDtypeStruct(shape, np.float32)
        for part in reversed(array.split("/")):
            tree = {part: tree}
        split = jax.tree.leaves(sharding.by_rules(tree, sharding.RULES, made))[0]
    number, found = {device: i for i, device in enumerate(made.devices.flat)}, {}
    for device, index in split.devices_indices_map(shape).items():
        edges = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        found.setdefault(tuple(edges[-2:]), []).append(number[device])
    return found


def mesh() -> None:
    """Which of eight devices holds which part of three arrays, on three meshes."""
    arrays = {
        "batch of images": ("batch", (8, 8)),
        "kernel of a convolution [3, 3, 320, 640]": ("unet/conv1/kernel", (3, 3, 320, 640)),
        "kernel of attn1.to_q [640, 640]": ("unet/attn1/to_q/kernel", (640, 640)),
    }
    meshes = ({"data": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2})
    figure, axes = plt.subplots(len(arrays), len(meshes), figsize=(9, 7.2))
    for (row, column), axis in np.ndenumerate(axes):
        title, (array, shape) = list(arrays.items())[row]
        made = sharding.make_mesh(schema.MeshConfig(**meshes[column]))
        height, width = shape[-2:]
        for ((top, bottom), (left, right)), devices in held(array, shape, made).items():
            x, y = left / width, 1 - bottom / height
            wide, high = (right - left) / width, (bottom - top) / height
            colour = plt.cm.Set3(min(devices) / 8)
            box = plt.Rectangle((x, y), wide, high, facecolor=colour, edgecolor="white", lw=2)
            axis.add_patch(box)
            text = " ".join(map(str, sorted(devices)))
            axis.text(x + wide / 2, y + high / 2, text, ha="center", va="center", fontsize=8)
        axis.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1))
        axis.set_frame_on(False)
        if column == 1:
            axis.set_xlabel(title, fontsize=10)
        if row == 0:
            sizes = " x ".join(f"{name} {size}" for name, size in meshes[column].items())
            axis.set_title(sizes, fontsize=11)
    save(figure, "mesh")


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU chip as a mesh is made of."""

    id: int
    slice_index: int
    process_index: int
    coords: tuple[int, int, int]
    device_kind: str = "TPU v5 lite"
    platform: str = "tpu"
    core_on_chip: int = 0


def slices() -> None:
    """Two TPU slices of 4x4 under --mesh.data 2 --mesh.fsdp 4: the groups that share parameters."""
    chips = [
        Chip(16 * s + 4 * y + x, s, 4 * s + 2 * (y // 2) + x // 2, (x, y, 0))
        for s, y, x in itertools.product(range(2), range(4), range(4))
    ]
    made = sharding.make_mesh(schema.MeshConfig(data=4, fsdp=4, dcn_data=2), chips)
    figure, axes = plt.subplots(1, 2, figsize=(8, 4))
    for (row, column, _), chip in np.ndenumerate(made.devices):
        x, y, _ = chip.coords
        box = plt.Rectangle((x + 0.06, 3.06 - y), 0.88, 0.88, facecolor=plt.cm.tab20(row * 2 + 1))
        axes[chip.slice_index].add_patch(box)
        text = f"data {row}\nfsdp {column}"
        axes[chip.slice_index].text(x + 0.5, 3.5 - y, text, ha="center", va="center", fontsize=8)
    for i, axis in enumerate(axes):
        axis.set(xlim=(0, 4), ylim=(0, 4), xticks=[], yticks=[], title=f"slice {i}", aspect="equal")
    figure.suptitle("gradients alone cross between the slices", y=0.02, fontsize=10)
    save(figure, "slices")


def plans() -> None:
    """Memory and time of the plans of benchmarks/results/plan.md, against what a chip has."""
    capacity = {"v5e": 16.91, "v5p": 102.80, "v6e": 33.55}
    text = (ROOT / "benchmarks" / "results" / "plan.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    rows = [row for row in rows if len(row) == 11 and re.match(r"[\d.]+ \(", row[3])]
    figure, axis = plt.subplots(figsize=(9, 0.42 * len(rows) + 0.8))
    for i, (name, where, per_chip, memory, _, step, mfu, *_) in enumerate(rows):
        _, held, work = map(float, re.findall(r"[\d.]+", memory))
        most = capacity[re.search(r"v\d\w", where)[0]]
        axis.barh(i, 100 * held / most, color="#4c72b0")
        axis.barh(i, 100 * work / most, left=100 * held / most, color="#9fb8dd")
        axis.text(101, i, f"{step} ms, MFU {mfu}", va="center", fontsize=8)
        axis.text(-1, i, f"{name} ({where}, {per_chip})", va="center", ha="right", fontsize=8)
    axis.axvline(100, color="black", lw=1)
    axis.set(xlim=(0, 100), yticks=[], xlabel="% of the chip's memory: arguments, temporary arrays")
    axis.invert_yaxis()
    axis.spines[["top", "right", "left"]].set_visible(False)
    save(figure, "plans")


def published() -> None:
    """Parameters of the published models by part, from their names and shapes."""
    golden = ROOT / "tests" / "golden" / "released_checkpoint_shapes.json.gz"
    shapes = json.loads(gzip.decompress(golden.read_bytes()))
    parts = {
        "UNet": ("model.diffusion_model.", "#4c72b0"),
        "first stage": ("first_stage_model.", "#dd8452"),
        "condition": ("cond_stage_model.", "#55a868"),
    }
    shown = {
        "Stable Diffusion v1": "sd__configs__stable-diffusion__v1-inference",
        "text2img-large": "configs__latent-diffusion__txt2img-1p4B-eval",
        "RDM 768x768": "configs__retrieval-augmented-diffusion__768x768",
        "LDM text2img256": "ldm__text2img256",
        "cin256-v2": "configs__latent-diffusion__cin256-v2",
        "inpainting_big": "ldm__inpainting_big",
        "layout2img-openimages256": "ldm__layout2img-openimages256",
        "lsun_churches256": "ldm__lsun_churches256",
        "celeba256": "ldm__celeba256",
        "semantic_synthesis256": "ldm__semantic_synthesis256",
        "bsr_sr": "ldm__bsr_sr",
    }
    figure, axis = plt.subplots(figsize=(8, 3.6))
    for i, key in enumerate(shown.values()):
        left = 0.0
        for part, (prefix, colour) in parts.items():
            sizes = [np.prod(s) for name, s in shapes[key].items() if name.startswith(prefix)]
            size = sum(sizes) / 1e6
            axis.barh(i, size, left=left, color=colour, label=part if i == 0 else None)
            left += size
        axis.text(left + 10, i, f"{left:.0f} M", va="center", fontsize=8)
    axis.set(yticks=range(len(shown)), xlabel="million parameters")
    axis.set_yticklabels(shown, fontsize=8)
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, "published")


def resumed() -> None:
    """A first stage that is killed twice, beside one that is left alone: every loss is the same."""
    every = ["--steps", "60", "--intervals.log", "1", "--intervals.save", "10"]
    every += ["--intervals.sample", "0", "--intervals.evaluate", "0"]
    with tempfile.TemporaryDirectory() as folder:
        kills, runs = [], [Path(folder) / name for name in ("alone", "killed")]
        for run in runs:
            train = [sys.executable, "-m", "ldm_jax", "train", "tiny:first_stage"]
            command = [*train, "--workdir", str(run), *every]
            for after in (20, 40) if run.name == "killed" else ():
                process = subprocess.Popen(command, cwd=ROOT)
                while not (run / "checkpoints" / str(after)).exists():
                    time.sleep(0.05)
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills.append(checkpoint.latest_step(run))
            subprocess.run(command, cwd=ROOT, check=True)
        losses = [[line["loss"] for line in rundir.read_metrics(run)] for run in runs]
    figure, axis = plt.subplots(figsize=(7, 2.8))
    steps = np.arange(1, 61)
    axis.plot(steps, losses[0], color="#9fb8dd", lw=6, label="left alone")
    axis.plot(steps, losses[1], color="black", lw=1, label="killed twice, resumed")
    for step in kills:
        label = "SIGKILL after this checkpoint" if step == kills[0] else None
        axis.axvline(step, color="#c44e52", ls=":", label=label)
    apart = np.abs(np.subtract(*losses)).max()
    axis.set(xlabel="step", ylabel="loss", title=f"largest difference of a loss: {apart:g}")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, "resumed")


def drawn(model, labels, steps=50, scale=2.0, **more):
    """Pictures of these classes, one for each."""
    cond, null = model.encode({"label": np.asarray(labels)})
    options = {n: more.pop(n) for n in ("solver",) if n in more}
    sample = jax.jit(ldm_jax.make_sampler(model, steps=steps, **options))
    keys = ldm_jax.keys(3, len(labels))
    return sample(model.params, cond, keys, null, guidance_scale=scale, **more)


def sheet(name: str, rows: dict[str, np.ndarray]) -> None:
    """Rows of pictures with their names."""
    stacked = images.to_uint8(np.concatenate(list(rows.values())))
    columns = len(next(iter(rows.values())))
    pixels = images.grid(stacked, columns, scale=3, names=tuple(rows))
    Image.fromarray(pixels).quantize(64).save(PICTURES / f"{name}.png", optimize=True)


def convert() -> None:
    """The demo's model, and what is left of it after files of two types of number."""
    model, labels = ldm_jax.load(DEMO), range(10)
    rows = {"the run": drawn(model, labels)}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "float16"):
            file = f"{folder}/{dtype}.safetensors"
            command = [sys.executable, "-m", "ldm_jax", "convert", str(DEMO), file, "--to"]
            command.append("compvis")
            subprocess.run([*command, "--dtype", dtype], check=True)
            rows[f"as {dtype}"] = drawn(ldm_jax.load(file), labels)
    first = images.to_uint8(rows["the run"]).astype(int)
    for name, row in rows.items():
        print(name, np.abs(images.to_uint8(row) - first).max(), "grey levels from the run's")
    sheet("convert", rows)


def python() -> None:
    """Pictures that the calls of docs/python.md make of the demo's model."""
    model, labels = ldm_jax.load(DEMO), np.arange(10)

    def step(denoise, carry, x, level, keys):
        denoised = denoise(x, level)
        return carry, level.alpha_next * denoised.x0 + level.sigma_next * denoised.eps, denoised

    first = drawn(model, labels)
    init = model.encode_image(first)
    mask = np.zeros((10, *model.latent_shape[:2], 1), np.float32)
    mask[:, model.latent_shape[0] // 2 :] = 1
    own = solvers.Solver(init=lambda x: (), step=step)
    sheet("python", {
        "drawn": first,
        "start=25": drawn(model, (labels + 1) % 10, start=25, init=init),
        "mask": drawn(model, (labels + 1) % 10, init=init, mask=mask),
        "scale 6": drawn(model, labels, scale=6.0),
        "own solver": drawn(model, labels, steps=8, solver=own),
    })  # fmt: skip


KINDS = {
    f.__name__: f for f in (augmentation, mesh, slices, plans, published, resumed, convert, python)
}


def main() -> None:
    """Make the pictures that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*KINDS, []], help="pictures; none: all")
    for name in parser.parse_args().names or KINDS:
        KINDS[name]()


if __name__ == "__main__":
    main()
