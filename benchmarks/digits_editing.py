"""Edits held-out digits after `make demo`: `python benchmarks/digits_editing.py runs/demo`.

Fills the lower half of held-out digits with `ldm-sample inpaint`, turns one into every other with
`img2img`, walks between classes with `variations`, draws at twice the training size, leads digits
to a slant with docs/guide_digits.py; writes DIR/editing/report.json and pictures. A classifier
trained on the real training split judges.
"""

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from demo_report import small
from etils import epath
from sklearn.svm import SVC

import ldm_jax
from ldm_jax import data, sampling
from ldm_jax.runtime import cli, images, rundir
from ldm_jax.sample import main as sample

COUNT = 80  # held-out digits that are completed
TARGET = 0.8  # share of completions that the classifier takes for the true class
CLASSES = np.arange(10)


def main(folder: epath.Path) -> int:
    """Writes the report and the pictures; returns 0 if the target is met."""
    out = folder / "editing"
    config = rundir.read_config(folder / "ldm").data
    train, train_labels = data.arrays(data.open_source(config, "train"), config.channels)
    held, held_labels = data.arrays(data.open_source(config, "eval"), config.channels)
    classifier = SVC(C=10, gamma="scale").fit(small(train), train_labels)
    chosen = np.random.default_rng(0).permutation(len(held))[:COUNT]
    real, labels = held[chosen], held_labels[chosen]
    half = real.shape[1] // 2
    digits, mask = write_inputs(out / "held_out", real)
    one_of_each = [digits[int(np.argmax(labels == c))] for c in CLASSES]

    def accuracy(pixels: np.ndarray, asked: np.ndarray) -> float:
        return float(np.mean(classifier.predict(small(pixels)) == asked))

    def call(task: str, name: str, *flags: object) -> np.ndarray:
        """uint8 [N, H, W, c] of a command, whose files go to DIR/editing/NAME."""
        fixed = ("--model", folder / "ldm", "--out", out / name, "--batch-size", COUNT)
        argv = [task, "--npz", "--overwrite", *map(str, (*fixed, *flags))]
        if cli.run("ldm-sample", sample.sample, argv) != 0:
            raise SystemExit(1)
        with (out / name / "samples.npz").open("rb") as file:
            return np.load(file)["arr_0"]

    def completed(name: str, *flags: object) -> dict[str, float]:
        files = ("--images", *digits, "--masks", mask, "--num-images", 1)
        made = call("inpaint", name, *files, *flags)
        known = np.abs(made[:, :half].astype(int) - real[:, :half])
        return {"accuracy": accuracy(made, labels), "largest_change_of_known": int(known.max())}

    hidden = real.copy()
    hidden[:, half:] = 0
    report = {
        "real": {"accuracy": accuracy(real, labels)},
        "upper_half_alone": {"accuracy": accuracy(hidden, labels)},
        "completed": completed("inpaint", "--labels", *labels),
        "completed_class_not_told": completed("inpaint_class_not_told"),
    }
    few = ("--masks", mask, "--num-images", 5, "--labels", *CLASSES)
    call("inpaint", "inpaint_picture", "--images", *one_of_each, *few)
    for strength in (0.1, 0.3, 0.5, 0.7, 0.9):
        flags = ("--strength", strength, "--guidance-scale", 3, "--num-images", 4)
        files = ("--images", one_of_each[3], "--labels", *CLASSES)
        made = call("img2img", f"img2img_{strength}", *files, *flags)
        report[f"img2img_{strength}"] = {"accuracy": accuracy(made, np.repeat(CLASSES, 4))}
    call("variations", "variations", "--labels", 3, 8, 0, "--num-images", 9)
    call("class2img", "twice_the_size", "--height", 2 * len(real[0]), "--width", 2 * len(real[0]))
    report["slant"] = slanted(folder / "ldm", train, accuracy)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2), file=sys.stderr)
    return 0 if report["completed"]["accuracy"] >= TARGET else 1


def slanted(run: epath.Path, real: np.ndarray, accuracy: Callable) -> dict:
    """Figures of docs/guide_digits.py, of the pictures that it draws: two slants of each class."""
    where = Path(__file__).parents[1] / "docs" / "guide_digits.py"
    spec = importlib.util.spec_from_file_location(where.stem, where)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model, labels = ldm_jax.load(run), np.tile(CLASSES, 2)
    goals = np.repeat([-0.3, 0.3], len(labels) // 2)
    keys = sampling.keys_of(0, np.arange(len(labels)) % (len(labels) // 2))
    began = time.perf_counter()
    before, after = map(np.asarray, script.guide(model, labels, goals, keys))
    found = {"seconds": time.perf_counter() - began}
    own = script.slant(real / np.float32(127.5) - 1)
    found["real"] = {"mean": float(np.mean(own)), "std": float(np.std(own))}
    for name, pictures, which in (
        ("as drawn", before, goals > 0),
        ("led to -0.3", after, goals < 0),
        ("led to 0.3", after, goals > 0),
    ):
        slants = script.slant(pictures[which])
        found[name] = {
            "mean": float(np.mean(slants)),
            "std": float(np.std(slants)),
            "accuracy": accuracy(images.to_uint8(pictures[which]), labels[which]),
        }
    return found


def write_inputs(folder: epath.Path, pixels: np.ndarray) -> tuple[list[epath.Path], epath.Path]:
    """(PNGs of the digits, PNG of a mask whose lower half is the hole)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03d}.png" for i in range(len(pixels))]
    for path, picture in zip(paths, pixels, strict=True):
        images.save_png(path, picture, {})
    hole = np.zeros_like(pixels[0])
    hole[len(hole) // 2 :] = 255
    images.save_png(folder / "mask.png", hole, {})
    return paths, folder / "mask.png"


if __name__ == "__main__":
    sys.exit(main(epath.Path(sys.argv[1])))
