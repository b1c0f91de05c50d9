"""Measures and draws what `make demo` made: `python benchmarks/demo_report.py runs/demo`.

Reads DIR/first_stage, DIR/ldm and DIR/samples/samples.npz; writes DIR/report.json and pictures.
Samples are judged in pixels averaged down to 8x8, the size the digits were scanned at, against
held-out digits that neither stage nor the classifier has seen.

`--targets` prints what is to be reached. `--beside DIR ...` measures nothing and prints one row of
a table for every folder, of what is there already: DIR/report.json, and
DIR/reconstruct/result.json of `ldm-eval reconstruct`.
"""

import argparse
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from sklearn.decomposition import PCA
from sklearn.svm import SVC

import ldm_jax
from ldm_jax import conditioning, data, latents, sampling
from ldm_jax.metrics import manifold
from ldm_jax.runtime import images, rundir

TARGETS = {"accuracy": 0.95, "precision": 0.70, "recall": 0.50, "psnr": 25.0}
FIGURES = ("accuracy", "precision", "recall", "memorisation")
COUNT = 360  # samples judged, as many as there are held-out digits
NEIGHBOURS = 3


def small(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, S, S, 1] -> features [N, 64]: means of cells, 0..1."""
    n, side = pixels.shape[:2]
    cell = side // 8
    cells = pixels.reshape(n, 8, cell, 8, cell).astype(np.float64)
    return cells.mean(axis=(2, 4)).reshape(n, 64) / 255


def psnr(real: np.ndarray, other: np.ndarray) -> float:
    """Mean over images of the PSNR in dB between uint8 images."""
    error = (real.astype(np.float64) - other.astype(np.float64)) / 255
    mse = np.mean(np.square(error), axis=tuple(range(1, error.ndim)))
    return float(np.mean(-10 * np.log10(np.maximum(mse, 1e-12))))


def main() -> int:
    """Reports on one folder, or shows several side by side; an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=epath.Path, help="what make demo made")
    parser.add_argument("--targets", action="store_true", help="print what a demo is to reach")
    parser.add_argument("--beside", nargs="+", type=epath.Path, help="folders to show beside it")
    args = parser.parse_args()
    if args.targets:
        print(targets(args.folder))
        return 0
    if args.beside is None:
        return report_on(args.folder)
    print("\n".join(rows([args.folder, *args.beside])))
    return 0


def targets(folder: epath.Path) -> str:
    """Text on the steps of `make demo`, how long they take, and the figures they are to reach."""
    least = ", ".join(f"{name} {value:g}" for name, value in TARGETS.items())
    return (
        f"Trains both stages on handwritten digits, samples and measures, in {folder}/: 8 to 12"
        " minutes on two CPU cores.\nPictures of a stage on its way: "
        f"{folder}/*/samples/*.png. Stopped, it goes on with the same command.\n"
        f"It passes with at least: {least} (dB, of reconstructions)."
    )


def rows(folders: list[epath.Path]) -> list[str]:
    """Lines of a Markdown table: a header, and the figures of every folder."""
    lines = []
    for folder in folders:
        generated = json.loads((folder / "report.json").read_text())["generated"]
        back = json.loads((folder / "reconstruct" / "result.json").read_text())["figures"]
        cells = {
            "": folder.name,
            "PSNR": f"{back['psnr']:.2f}",
            "SSIM": f"{back['ssim']:.4f}",
            "R-FD (random features)": f"{back['r_fd_random_features']:.5f}",
            **{name: f"{generated[name]:.3f}" for name in FIGURES},
        }
        if not lines:
            lines = ["| " + " | ".join(cells) + " |", "| --- " * len(cells) + "|"]
        lines.append("| " + " | ".join(cells.values()) + " |")
    return lines


def report_on(folder: epath.Path) -> int:
    """Writes the report and the pictures; returns 0 if every target is met."""
    model = ldm_jax.load(folder / "ldm")
    config = rundir.read_config(folder / "ldm").data
    train, train_labels = data.arrays(data.open_source(config, "train"), config.channels)
    held, held_labels = data.arrays(data.open_source(config, "eval"), config.channels)
    generated, labels = read_samples(folder / "samples")
    classifier = SVC(C=10, gamma="scale").fit(small(train), train_labels)
    random = np.random.default_rng(0)

    def row(pixels: np.ndarray, asked: np.ndarray, same: bool = False) -> dict[str, float]:
        features = small(pixels)
        precision, recall = manifold.precision_recall(small(held), features, NEIGHBOURS, same=same)
        return {
            "accuracy": float(np.mean(classifier.predict(features) == asked)),
            "precision": precision,
            "recall": recall,
            "memorisation": manifold.memorisation(small(train), features),
        }

    decoded = reconstruct(model, held)
    some = random.permutation(len(train))[:COUNT]
    means = np.stack([train[train_labels == c].mean(axis=0) for c in labels]).astype(np.uint8)
    values = int(np.prod(model.latent_shape))
    report = {
        "generated": row(generated, labels),
        "held_out": row(held, held_labels, same=True),
        "training": row(train[some], train_labels[some]),
        "class_means": row(means, labels),
        "reconstructed": {**row(decoded, held_labels), "psnr": psnr(held, decoded)},
        "pca": {"components": values, "psnr": psnr(held, project(train, held, values))},
        "latent_values": values,
        "samples": len(generated),
        "guidance_scale": images.read_settings(folder / "samples" / "grid.png")["guidance_scale"],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(folder, model, held, decoded, generated, labels)
    return tell(folder, report)


def read_samples(folder: epath.Path) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 samples, labels asked for) that ldm-sample wrote: equally many of each class."""
    with (folder / "samples.npz").open("rb") as file:
        pixels = np.load(file)["arr_0"]
    settings = images.read_settings(folder / "grid.png")
    classes = settings["labels"] or range(len(pixels) // settings["num_images"])
    return pixels, np.repeat(np.asarray(classes), settings["num_images"])


def reconstruct(model: ldm_jax.bundle.LatentDiffusion, pixels: np.ndarray) -> np.ndarray:
    """Through the first stage and back, from the posterior's mode, uint8."""

    @jax.jit
    def run(params: dict, image: jax.Array) -> jax.Array:
        z = latents.encode(model.first_stage, params, image, 1.0)
        return latents.decode(model.first_stage, params, z, 1.0)

    image = jnp.asarray(pixels, jnp.float32) / 127.5 - 1
    return images.to_uint8(run(model.params["first_stage"], image))


def project(train: np.ndarray, held: np.ndarray, components: int) -> np.ndarray:
    """Held-out images through as many principal components of the training images."""
    pca = PCA(components).fit(train.reshape(len(train), -1))
    flat = pca.inverse_transform(pca.transform(held.reshape(len(held), -1)))
    return np.clip(np.rint(flat), 0, 255).reshape(held.shape).astype(np.uint8)


def draw(folder, model, held, decoded, generated, labels) -> None:
    """reconstructions.png, samples.png, trajectory.png, losses.png."""
    pairs = np.concatenate([held[:16], decoded[:16]])
    sheet = images.grid(pairs, 16, scale=3, names=("held out", "decoded"))
    images.save_png(folder / "reconstructions.png", sheet)
    ten = np.concatenate([generated[labels == c][:10] for c in np.unique(labels)])
    sheet = images.grid(ten, 10, scale=3, names=[str(c) for c in np.unique(labels)])
    images.save_png(folder / "samples.png", sheet)
    images.save_png(folder / "trajectory.png", trajectory(model))
    curves(folder)


def trajectory(model: ldm_jax.bundle.LatentDiffusion) -> np.ndarray:
    """What the model takes the image to be at ten of fifty steps, one row for each of 0..9."""
    trace = lambda x, denoised: denoised.x0  # noqa: E731
    sample = sampling.make_sampler(model, steps=50, trace=trace)

    @functools.partial(jax.jit)
    def run(params: dict, keys: jax.Array) -> jax.Array:
        arguments = (model.config.cond, model.cond_stage, params["cond_stage"])
        batch = {"label": jnp.arange(10)}
        cond = conditioning.from_batch(*arguments, batch)
        null = conditioning.null_like(*arguments, batch)
        _, x0s = sample(params, cond, keys, null, 1.5)
        shown = x0s[jnp.asarray([0, 5, 10, 15, 20, 25, 30, 35, 42, 49])]
        decode = functools.partial(
            latents.decode, model.first_stage, params["first_stage"], scale=model.latent_scale
        )
        return jax.lax.map(decode, shown)

    steps = np.asarray(run(model.params, sampling.keys_of(0, np.arange(10))))
    pixels = images.to_uint8(np.swapaxes(steps, 0, 1).reshape(-1, *steps.shape[2:]))
    return images.grid(pixels, len(steps), scale=3, names=[str(c) for c in range(10)])


def curves(folder: epath.Path) -> None:
    """Losses of both stages over their steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for axis, run, names in (
        (axes[0], "first_stage", ("loss", "eval/loss", "eval/loss_ema")),
        (axes[1], "ldm", ("loss_simple", "eval/loss", "eval/loss_ema")),
    ):
        records = rundir.read_metrics(folder / run)
        for name in names:
            points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
            axis.plot(*zip(*points), label=name, marker="o" if "eval" in name else None)
        axis.set(title=run, xlabel="step", yscale="log")
        axis.legend()
    with (folder / "losses.png").open("wb") as file:
        figure.savefig(file, format="png", dpi=110)


def tell(folder: epath.Path, report: dict) -> int:
    """Prints the rows and where to look; 1 if a target is missed."""
    print(f"{'':15}" + "".join(f"{name:>14}" for name in FIGURES))
    for kind in ("generated", "held_out", "training", "class_means", "reconstructed"):
        print(f"{kind:15}" + "".join(f"{report[kind][name]:14.3f}" for name in FIGURES))
    generated, reconstructed = report["generated"], report["reconstructed"]
    print(
        f"reconstruction of held-out digits: {reconstructed['psnr']:.1f} dB with"
        f" {report['latent_values']} latent values; PCA with {report['pca']['components']}"
        f" components: {report['pca']['psnr']:.1f} dB"
    )
    pictures = ("samples.png", "reconstructions.png", "trajectory.png", "losses.png")
    print(f"look at {', '.join(str(folder / name) for name in pictures)}; {folder / 'report.json'}")
    reached = {**generated, "psnr": reconstructed["psnr"]}
    missed = [
        f"{name} {reached[name]:.3f} below {least}"
        for name, least in TARGETS.items()
        if reached[name] < least
    ]
    excess = generated["memorisation"] - report["held_out"]["memorisation"]
    if excess > 0.10:
        missed.append(f"memorisation {excess:.3f} above that of held-out digits")
    print("every target met" if not missed else f"missed: {'; '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
