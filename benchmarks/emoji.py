"""Measures a text model of emoji and draws its grid: `python benchmarks/emoji.py runs/emoji`.

The recogniser (`ldm_jax.metrics.icons`, the nearest of 88 icons) reads samples of the held-out
pairs, of pairs that trained and of single icons, and real scenes of the same captions through the
first stage, which are the ceiling. Writes DIR/emoji.md and a picture with the prompts under it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import machine
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import ldm_jax
from ldm_jax import bundle
from ldm_jax.data import emoji
from ldm_jax.metrics import icons
from ldm_jax.runtime import images

ROOT = Path(__file__).parents[1]
TARGET = 0.7  # of both icons and their order, on held-out pairs
BATCH = 64
COLUMNS, SCALE, GAP, LINE = 6, 4, 10, 13  # of the picture
SHOWN = 12

Names = tuple[str, ...]


def main() -> int:
    """Measure, write, and tell; 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="what ldm-sample --model reads")
    parser.add_argument("--step", type=int, help="of the run; default: its newest weights")
    parser.add_argument("--pairs", type=int, default=512, help="held-out pairs, at most 512")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "pictures")
    options = parser.parse_args()
    model = ldm_jax.load(options.model, step=options.step)
    report, pictures = measure(model, options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "emoji.md").write_text(markdown(report, options))
    options.docs.mkdir(parents=True, exist_ok=True)
    images.save_png(options.docs / "emoji.png", sheet(*pictures))
    print(json.dumps(report, indent=1))
    return 0 if report["pairs held out"]["right"] >= TARGET else 1


def asked(count: int) -> dict[str, list[Names]]:
    """Kind: what is asked for, `count` of each, in a mixed order that a larger count continues."""
    pairs = [(a, b) for a in emoji.NAMED for b in emoji.NAMED if a != b]
    kinds = {
        "pairs held out": emoji.held_out_pairs(),
        "pairs of training": [pair for pair in pairs if not emoji.is_held_out(*pair)],
        "one icon": [(name,) for name in emoji.NAMED for _ in range(4)],
    }
    rng = np.random.default_rng(0)
    return {kind: [of[i] for i in rng.permutation(len(of))[:count]] for kind, of in kinds.items()}


def measure(model: bundle.LatentDiffusion, options: argparse.Namespace) -> tuple[dict, tuple]:
    """(figures by kind, (pictures, their captions) of the grid)."""
    sample = jax.jit(ldm_jax.make_sampler(model, steps=options.steps))
    report, shown = {}, ()
    for kind, names in asked(options.pairs).items():
        captions = [emoji.caption(*one) for one in names]
        drawn = draw(model, sample, captions, options.guidance_scale)
        real = reconstructed(model, names)
        report[kind] = judged(drawn, names) | {"ceiling": judged(real, names)["right"]}
        if kind == "pairs held out":
            shown = drawn[:SHOWN], captions[:SHOWN]
    things = draw(model, sample, ["a thing"] * BATCH, options.guidance_scale)
    report["a thing"] = {
        "one of the things": float(
            np.mean([set(n) <= set(emoji.THINGS) for n in icons.read(things)])
        )
    }
    return report, shown


def judged(pictures: np.ndarray, names: Sequence[Names]) -> dict[str, float]:
    """Shares of pictures: all icons right and in order; in the other order; single icons right."""
    read = icons.read(pictures)
    pairs = list(zip(read, names, strict=True))
    each = [a == b for got, wanted in pairs for a, b in zip(got, wanted)]
    return {
        "right": float(np.mean([a == b for a, b in pairs])),
        "swapped": float(np.mean([a == b[::-1] != b for a, b in pairs])),
        "count": float(np.mean([len(a) == len(b) for a, b in pairs])),
        "each": float(np.mean(each)),
        "pictures": len(names),
    }


def draw(
    model: bundle.LatentDiffusion, sample, captions: Sequence[str], guidance_scale: float
) -> np.ndarray:
    """uint8 [N, H, W, 3] of the captions, in batches of one shape; picture i has key i."""
    keys = ldm_jax.keys(seed=0, n=-(-len(captions) // BATCH) * BATCH)
    drawn = []
    for first in range(0, len(captions), BATCH):
        some = list(captions[first : first + BATCH])
        padded = some + some[:1] * (BATCH - len(some))
        cond, null = model.encode(ldm_jax.prompts(model, padded))
        batch = sample(
            model.params, cond, keys[first : first + BATCH], null, guidance_scale=guidance_scale
        )
        drawn.append(images.to_uint8(batch)[: len(some)])
    return np.concatenate(drawn)


def reconstructed(model: bundle.LatentDiffusion, names: Sequence[Names]) -> np.ndarray:
    """uint8 [N, H, W, 3] of real scenes, through the first stage and back."""
    rng = np.random.default_rng(1)
    real = np.stack([emoji.scene(one, rng, size=model.config.size) for one in names])
    through = jax.jit(lambda x: model.decode(model.encode_image(x)))
    batches = (real[i : i + BATCH] for i in range(0, len(real), BATCH))
    return np.concatenate(
        [images.to_uint8(through(x.astype(np.float32) / 127.5 - 1)) for x in batches]
    )


def sheet(pictures: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """uint8 [H, W, 3]: the pictures in rows, each above its caption in two lines."""
    side = pictures.shape[1] * SCALE
    width, height = side + GAP, side + GAP + 2 * LINE
    rows = -(-len(pictures) // COLUMNS)
    page = Image.new("RGB", (GAP + COLUMNS * width, GAP + rows * height), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=LINE - 1)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = GAP + i % COLUMNS * width, GAP + i // COLUMNS * height
        page.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC), (x, y))
        text = caption.replace(" left of ", "\nleft of ")
        pen.multiline_text((x + side / 2, y + side + 2), text, "black", font, "ma", 1, "center")
    return np.asarray(page)


def markdown(report: dict, options: argparse.Namespace) -> str:
    """The page of results."""
    facts = machine.facts()
    lines = [
        "# A text model of emoji",
        "",
        f"`{facts['command']}` on {facts['date']}, {facts['commit']}, {facts['cores']} cores"
        f" ({facts['cpu']}). {options.steps} steps of DDIM, guidance {options.guidance_scale:g}.",
        "",
        "The recogniser takes the nearest of 88 icons at every place. *right*: all icons and their"
        " order (by chance 1/4032 of two); *ceiling*: the same of real scenes through the first"
        " stage; *each*: single icons at their places; *swapped*: the other order; *count*: as many"
        " icons as asked for.",
        "",
        "| asked for | pictures | right | ceiling | each | swapped | count |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, row in report.items():
        if "right" in row:
            figures = (
                f"{row[name]:.3f}" for name in ("right", "ceiling", "each", "swapped", "count")
            )
            lines.append(f"| {kind} | {row['pictures']} | {' | '.join(figures)} |")
    share = report["a thing"]["one of the things"]
    lines += [
        "",
        f'"a thing": {share:.3f} of {BATCH} pictures show one of the 16 icons without a name.',
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
