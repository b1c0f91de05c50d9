"""Tables and pictures of what `photos.py` trained: from run folders alone, whatever is there."""

import json
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import data, latents, loading, schema
from ldm_jax.models import autoencoder
from ldm_jax.runtime import images, rundir

STAGES = ("kl_f4", "kl_f8", "vq_f4", "vq_f8")
WAYS = {"plain": "without", "gan": "with"}  # the GAN term
SOURCES = {"images": "images", "cache": "cache"}  # of the diffusion model's latents
COLUMNS = {
    "r_fd_random_features": "R-FD (random features)",
    "psnr": "PSNR",
    "lpips_random_features": "PSIM (LPIPS, random features)",
    "ssim": "SSIM",
    "gradient_energy": "gradient energy",
    "fine_power": "power above Nyquist/2",
    "usage": "codes used",
}
SHOWN = 8  # held-out crops in a picture


def write(work: Path, out: Path, docs: Path) -> None:
    """OUT/photos.json, OUT/photos.md, and the pictures, of what WORK holds by now."""
    found = collect(work)
    out.mkdir(parents=True, exist_ok=True)
    (out / "photos.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "photos.md").write_text(markdown(found))
    if found["stages"]:
        crops(work, docs / "photos_first_stages.png")
        curves(work, docs / "photos_gan.png")
    if found["ldm"]:
        samples(work, docs / "photos_samples.png")


# --- figures -------------------------------------------------------------------------------------


def collect(work: Path) -> dict:
    """{"machines", "seconds", "stages": {STAGE_WAY: ...}, "ldm": {RUN: ...}} from files."""

    def kept(name: str, empty):
        path = work / name
        return json.loads(path.read_text()) if path.exists() else empty

    stages = {
        f"{stage}_{way}": stage_figures(work, f"{stage}_{way}")
        for stage in STAGES
        for way in WAYS
        if (work / "eval" / f"{stage}_{way}" / "result.json").exists()
    }
    runs = sorted(path.parent.name for path in (work / "eval").glob("ldm_*/result.json"))
    return {
        "machines": kept("machines.json", []),
        "seconds": kept("seconds.json", {}),
        "stages": stages,
        "ldm": {name: ldm_figures(work, name) for name in runs},
    }


def stage_figures(work: Path, name: str) -> dict:
    result = json.loads((work / "eval" / name / "result.json").read_text())
    config = rundir.read_config(work / name)
    records = rundir.read_metrics(work / name)
    return {
        "model": {
            "f": config.model.downsample,
            "codes": getattr(config.model, "num_codes", None),
            "c": config.model.embed_dim,
        },
        "training": {
            "steps": config.steps,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "disc_start": config.loss.disc_start,
            "disc_factor": config.loss.disc_factor,
            "disc_weight": config.loss.disc_weight,
        },
        "figures": result["figures"],
        "held_out_crops": result["count"],
        "boundary": boundary(records, config.loss.disc_start),
    }


def boundary(records: list[dict], start: int) -> dict:
    """Held-out PSNR of the raw weights at disc_start and after it, the adversary's extremes."""
    held = [(r["step"], r["eval/psnr"]) for r in records if "eval/psnr" in r]
    before = [x for step, x in held if step <= start]
    after = [x for step, x in held if step > start]
    late = [r for r in records if r["step"] > start]

    def of(name: str) -> list[float]:
        return [r[name] for r in late if r.get(name) is not None]

    found = {
        "psnr_at": before[-1] if before else None,
        "psnr_lowest_after": min(after, default=None),
        "psnr_end": held[-1][1] if held else None,
        "bad_steps": max(of("bad_steps"), default=None),
    }
    for name in ("d_weight", "disc_loss", "logits_real", "logits_fake"):
        if of(name):
            found[name] = [min(of(name)), statistics.median(of(name)), max(of(name))]
    return found


def ldm_figures(work: Path, name: str) -> dict:
    result = json.loads((work / "eval" / name / "result.json").read_text())
    config = rundir.read_config(work / name)
    records = rundir.read_metrics(work / name)
    rates = [r["images_per_s_per_device"] for r in records if r.get("images_per_s_per_device")]
    held = [r["eval/loss_ema"] for r in records if "eval/loss_ema" in r]
    return {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "cache": bool(config.cache.path),
        "figures": result["figures"],
        "count": result["count"],
        "images_per_s": statistics.median(rates) if rates else None,
        "held_out_loss": held[-1] if held else None,
    }


def markdown(found: dict) -> str:
    lines = ["# First stages on photos", ""]
    for machine in found["machines"]:
        packages = ", ".join(f"{n} {machine[n]}" for n in ("python", "jax", "jaxlib", "flax"))
        place = f"{machine['cores']} core(s), {machine['cpu']}"
        lines.append(f"- `{machine['command']}`, {machine['date']}, {place}, {packages}")
    if found["stages"]:
        lines += ["", *table_8(found["stages"]), "", *over_the_boundary(found["stages"])]
    if found["ldm"]:
        lines += ["", *cache_lines(found["ldm"])]
    lines += ["", *seconds(found["seconds"])]
    return "\n".join(lines) + "\n"


def table_8(stages: dict) -> list[str]:
    """In the shape of the paper's Table 8."""
    one = next(iter(stages.values()))
    training = one["training"]
    lines = [
        f"{one['held_out_crops']} held-out crops of 64x64; {training['steps']} steps of"
        f" {training['batch_size']} crops each, seed {training['seed']}, averaged weights; the GAN"
        f" term from step {training['disc_start']} on, or never. Gradient energy and power are the"
        " sum over the reconstructions by that over the originals: 1 is as sharp as these.",
        "",
        "| | f | codes | c | GAN term | " + " | ".join(COLUMNS.values()) + " |",
        "| --- |" + " --- |" * (4 + len(COLUMNS)),
    ]
    for name, found in stages.items():
        stage, way = name.rsplit("_", 1)
        model = found["model"]
        cells = [stage[:2].upper(), model["f"], model["codes"] or "", model["c"], WAYS[way]]
        cells += [shown(key, found["figures"].get(key)) for key in COLUMNS]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def shown(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if key == "usage":
        return f"{100 * value:.1f} %"
    return f"{value:.2f}" if key == "psnr" else f"{value:.3g}"


def over_the_boundary(stages: dict) -> list[str]:
    lines = [
        "Over `disc_start`: PSNR of held-out crops (raw weights) there, at its lowest evaluation"
        " afterwards, and at the end; then lowest, median and highest of training afterwards.",
        "",
        "| | GAN term | PSNR at disc_start | lowest after | end | d_weight | disc_loss"
        " | logits real | logits fake | bad steps |",
        "| --- |" + " --- |" * 9,
    ]
    for name, found in stages.items():
        stage, way = name.rsplit("_", 1)
        edge = found["boundary"]
        cells = [stage.replace("_", " "), WAYS[way]]
        cells += [shown("psnr", edge[key]) for key in ("psnr_at", "psnr_lowest_after", "psnr_end")]
        for key in ("d_weight", "disc_loss", "logits_real", "logits_fake"):
            three = edge.get(key) if way == "gan" else None
            cells.append(" / ".join(f"{x:.3g}" for x in three) if three else "")
        cells.append("" if edge["bad_steps"] is None else f"{edge['bad_steps']:g}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cache_lines(runs: dict) -> list[str]:
    one = next(iter(runs.values()))
    key = "fd_random_features"
    lines = [
        f"Diffusion on the latents of KL f4 (with the GAN term), {one['steps']} steps of"
        f" {one['batch_size']} crops; {one['count']} samples, DDIM, 25 steps, against the training"
        " crops.",
        "",
        "| latents from | seeds | FD (random features) of each | mean ± std | held-out loss"
        " | training images/s |",
        "| --- |" + " --- |" * 5,
    ]
    spread = {}
    for way in SOURCES:
        here = [run for name, run in runs.items() if name.startswith(f"ldm_{way}_")]
        if not here:
            continue
        values = [run["figures"][key] for run in here]
        std = statistics.stdev(values) if len(values) > 1 else float("nan")
        spread[way] = (statistics.mean(values), std)
        losses = [run["held_out_loss"] for run in here if run["held_out_loss"] is not None]
        rates = [run["images_per_s"] for run in here if run["images_per_s"]]
        cells = [
            way,
            ", ".join(str(run["seed"]) for run in here),
            ", ".join(f"{x:.4g}" for x in values),
            f"{spread[way][0]:.4g} ± {std:.2g}",
            f"{statistics.mean(losses):.4f}" if losses else "",
            f"{statistics.median(rates):.1f}" if rates else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if len(spread) == len(SOURCES):
        (a, std_a), (b, std_b) = spread.values()
        pooled = ((std_a**2 + std_b**2) / 2) ** 0.5
        lines += [
            "",
            f"The means differ by {abs(a - b) / pooled:.2f} standard deviations of a run.",
        ]
    return lines


def seconds(spent: dict) -> list[str]:
    lines = ["| command | seconds | of a core |", "| --- | --- | --- |"]
    lines += [f"| {n} | {x['seconds']:.0f} | {x['cpu_seconds']:.0f} |" for n, x in spent.items()]
    return lines


# --- pictures ------------------------------------------------------------------------------------


def crops(work: Path, path: Path) -> None:
    """Held-out crops and what every first stage makes of them, with and without the GAN term."""
    rows, names = [], []
    for stage in STAGES:
        for way, says in WAYS.items():
            run = work / f"{stage}_{way}"
            if not (work / "eval" / run.name / "result.json").exists():
                continue
            config = rundir.read_config(run)
            real = held_out(config)
            if not rows:
                rows, names = [images.to_uint8(real)], ["original"]
            rows.append(reconstructed(run, real))
            names.append(f"{stage.replace('_', ' ')} {says}")
    sheet = images.grid(np.concatenate(rows), SHOWN, scale=2, names=names)
    images.save_png(path.absolute(), sheet)


def held_out(config: schema.AutoencoderTrainConfig) -> np.ndarray:
    stream = data.stream(config.data, batch_size=1, seed=0, split="eval")
    return np.stack([stream[i]["image"] for i in range(SHOWN)])


def reconstructed(run: Path, real: np.ndarray) -> np.ndarray:
    """uint8 pixels, of the averaged weights and the posterior's mode, as `ldm-eval` has them."""
    params, model = loading.load_first_stage(run)
    module = autoencoder.from_config(model)

    @jax.jit
    def back(params: dict, image: jax.Array) -> jax.Array:
        return latents.decode(module, params, latents.encode(module, params, image, 1.0), 1.0)

    return images.to_uint8(np.asarray(back(params, jnp.asarray(real))))


def curves(work: Path, path: Path) -> None:
    """Held-out PSNR and the adversary's figures over the steps, disc_start marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    there = [
        s for s in STAGES if all((work / f"{s}_{way}" / "config.json").exists() for way in WAYS)
    ]
    figure, axes = pyplot.subplots(
        3, len(there), figsize=(4 * len(there), 8), layout="constrained", squeeze=False
    )
    for column, stage in enumerate(there):
        start = rundir.read_config(work / f"{stage}_gan").loss.disc_start
        for way, says in WAYS.items():
            records = rundir.read_metrics(work / f"{stage}_{way}")
            plot(axes[0, column], records, "eval/psnr", f"{says} GAN term", marker="o")
            plot(axes[1, column], records, "nll_loss", f"{says} GAN term")
        gan = rundir.read_metrics(work / f"{stage}_gan")
        for name in ("logits_real", "logits_fake", "disc_loss"):
            plot(axes[2, column], gan, name, name)
        axes[0, column].set(title=stage.replace("_", " "), ylabel="held-out PSNR, dB")
        axes[1, column].set(ylabel="nll_loss", yscale="log")
        axes[2, column].set(ylabel="discriminator", xlabel="step")
        for axis in axes[:, column]:
            axis.axvline(start, color="black", linestyle=":", linewidth=1)
            axis.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=80)
    pyplot.close(figure)


def plot(axis, records: list[dict], name: str, label: str, marker: str | None = None) -> None:
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    if points:
        axis.plot(*zip(*points), label=label, marker=marker, markersize=3, linewidth=1)


def samples(work: Path, path: Path) -> None:
    """Samples of the first seed, latents from images above and from the cache below."""
    grids = [work / "eval" / f"ldm_{way}_0" / "samples.npz" for way in SOURCES]
    rows = [np.load(grid)["arr_0"][: 3 * SHOWN] for grid in grids if grid.exists()]
    if rows:
        names = [way for way in SOURCES for _ in range(3)]
        sheet = images.grid(np.concatenate(rows), SHOWN, scale=2, names=names)
        images.save_png(path.absolute(), sheet)
