"""Teaches the text model of emoji icons that it does not know, by `ldm-train finetune`.

    python benchmarks/emoji_subjects.py docs/models/emoji

A way gets four pictures of one icon. The recogniser (`ldm_jax.metrics.icons`, the nearest of 88
icons) then reads what the finetuned model draws of the plain prompt, of prompts with a second icon,
which were never shown, and of the class that the prompt names. Writes DIR/emoji_subjects.md, and a
picture for the page of each way. A run that is there goes on; to begin anew, remove --runs.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import machine
import numpy as np
from emoji import ROOT, draw, reconstructed, sheet

import ldm_jax
from ldm_jax.data import emoji
from ldm_jax.metrics import icons
from ldm_jax.runtime import checkpoint, images

OF_CLASS = {"lion": "cat", "teddy": "bear", "rooster": "parrot"}
"""{icon that no training scene shows: the named icon whose class it joins}."""
THINGS = ("tiger", "trophy", "volcano", "plane")  # of the 16 that train as "thing" alone
BESIDE = ("bell", "boat")  # icons beside the new one in captioned pictures
TEXT = "a sks"  # a word of the tokenizer that no caption of training holds
SHOTS = 4  # pictures that a way gets
DRAWN = 64  # pictures of each kind of prompt
SHOWN = 3  # of each, in the pictures for the docs
SIZES = (
    "--data.size 32 --data.crop none --data.no-flip --data.source.eval-every 0 --batch-size 8"
    " --intervals.save 0 --intervals.sample 0 --intervals.evaluate 0 --ema.parts"
)


class Way(NamedTuple):
    """A recipe with its options, in which {subject}, {kind} and {texts} are filled in."""

    recipe: str
    options: str
    page: str = ""
    """Page of the docs with a picture of it."""
    captions: bool = False
    """It reads a caption beside every picture."""


TAUGHT = "--optimizer.learning-rate 1e-4 --instance-prompt '{text}'"
WAYS = {
    "full": Way("full", "--steps 100 --optimizer.learning-rate 1e-4", "finetune", True),
    "LoRA": Way(
        "lora", "--steps 200 --lora.rank 8 --optimizer.learning-rate 6e-4", "lora", captions=True
    ),
    "DreamBooth": Way(
        "dreambooth",
        f"--steps 150 {TAUGHT} --class-prompt '{{class_text}}' --num-class-images 64"
        " --prior-weight 0.5",
        "dreambooth",
    ),
    "DreamBooth without prior": Way("dreambooth", f"--steps 150 {TAUGHT}"),
}
INVERSION = Way(
    "textual_inversion",
    "--steps 200 --batch-size 32 --optimizer.learning-rate 2e-2 --optimizer.schedule cosine"
    " --optimizer.decay-steps 200 --token '<it>' --init-word {kind} --template-file {texts}",
    "textual_inversion",
)


def main() -> int:
    """Train, measure, write, and tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the text model of emoji, as --init-from reads it")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "emoji_subjects")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--subjects", nargs="*", choices=OF_CLASS, default=list(OF_CLASS))
    parser.add_argument("--things", nargs="*", choices=THINGS, default=list(THINGS))
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "pictures")
    options = parser.parse_args()
    lab = Lab(options)
    taught = {way: [lab.teach(way, s) for s in options.subjects] for way in options.ways}
    words = {
        "of the model's things": [lab.learn(name, "thing") for name in options.things],
        "of none of its pictures": [lab.learn(s, OF_CLASS[s]) for s in options.subjects[:1]],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    page = markdown(taught, words, lab.alone(), options)
    (options.out / "emoji_subjects.md").write_text(page)
    lab.show()
    print(page)
    return 0


class Lab:
    """The base model, what becomes of it, and the pictures for the docs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.base = options, ldm_jax.load(options.model)
        self.sample = jax.jit(ldm_jax.make_sampler(self.base, steps=options.steps))
        self.pages: dict[str, tuple[list[np.ndarray], list[str]]] = {}

    def teach(self, name: str, subject: str) -> dict[str, float]:
        """Shares of pictures that show what they should, after a way had pictures of `subject`."""
        way, kind = WAYS[name], OF_CLASS[subject]
        run = self.train(name, way, subject)
        model = ldm_jax.load(run)
        pairs = compositions(subject)
        texts = [called(subject, pair) for pair in pairs]
        plain, composed = self.draw(model, [TEXT] * DRAWN), self.draw(model, texts)
        old = emoji.caption(kind)
        before, after = (icons.read(self.draw(m, [old] * DRAWN)) for m in (self.base, model))
        self.keep(way, [*plain[:SHOWN], *composed[:SHOWN]], [TEXT] * SHOWN + texts[:SHOWN])
        read = icons.read(composed)
        return {
            "plain": share(r == (subject,) for r in icons.read(plain)),
            "in pairs": share(
                len(r) == 2 and r[p.index(subject)] == subject for r, p in zip(read, pairs)
            ),
            "both": share(r == p for r, p in zip(read, pairs)),
            "class before": share(r == (kind,) for r in before),
            "class after": share(r == (kind,) for r in after),
            "trained": numbers_trained(run),
        }

    def learn(self, name: str, kind: str) -> dict[str, float]:
        """As `teach`, of a word that textual inversion learns, from `kind` on."""
        run = self.train("word", INVERSION, name)
        model = ldm_jax.load(run)
        drawn = self.draw(model, ["a <it>"] * DRAWN)
        alone = self.draw(self.base, [f"a {kind}"] * DRAWN)
        self.keep(INVERSION, drawn[:SHOWN], [f"a <it>\n{name}"] * SHOWN)
        return {
            "word": share(r == (name,) for r in icons.read(drawn)),
            "first word": share(r == (name,) for r in icons.read(alone)),
            "trained": numbers_trained(run),
        }

    def draw(self, model: Any, captions: list[str]) -> np.ndarray:
        """uint8 [N, H, W, 3]: every model goes through the program of the base."""
        return draw(model, self.sample, captions, self.options.guidance_scale)

    def train(self, name: str, way: Way, subject: str) -> Path:
        """The run of a way, trained by its command."""
        runs, kind = self.options.runs.resolve(), OF_CLASS.get(subject, "thing")
        folder = shots(runs, subject, way)
        (runs / "texts.txt").write_text("a {}\n")
        given = {
            "text": TEXT,
            "kind": kind,
            "class_text": emoji.caption(kind),
            "texts": runs / "texts.txt",
        }
        words = [word.format(**given) for word in shlex.split(f"{SIZES} {way.options}")]
        run = runs / f"{subject}_{name.replace(' ', '_')}"
        command = [sys.executable, "-m", "ldm_jax", "train", f"finetune:{way.recipe}", *words]
        command += ["--init-from", str(self.options.model), "--workdir", str(run)]
        subprocess.run([*command, "--data.source.path", str(folder)], check=True)
        return run

    def alone(self) -> dict[str, float]:
        """Ceiling: real pictures of the icons, through the first stage."""
        names = [(name,) for name in (*OF_CLASS, *THINGS) for _ in range(8)]
        return share(r == n for r, n in zip(icons.read(reconstructed(self.base, names)), names))

    def keep(self, way: Way, pictures: list[np.ndarray], captions: list[str]) -> None:
        """Pictures of a way for its page."""
        if way.page:
            kept = self.pages.setdefault(way.page, ([], []))
            kept[0].extend(pictures)
            kept[1].extend(captions)

    def show(self) -> None:
        """Write the pictures of the pages."""
        self.options.docs.mkdir(parents=True, exist_ok=True)
        for page, (pictures, captions) in self.pages.items():
            images.save_png(
                self.options.docs / f"emoji_{page}.png", sheet(np.stack(pictures), captions)
            )


def shots(runs: Path, subject: str, way: Way) -> Path:
    """Folder with SHOTS pictures of an icon: alone, or where a way reads captions, in pairs too."""
    pairs = [(subject,), (subject,), (subject, BESIDE[0]), (BESIDE[1], subject)]
    scenes = pairs if way.captions else [(subject,)] * SHOTS
    folder = runs / "pictures" / f"{subject}{'_captioned' * way.captions}"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(emoji.NAMES.index(subject))
    for i, names in enumerate(scenes):
        images.save_png(folder / f"{i}.png", emoji.scene(names, rng))
        if way.captions:
            (folder / f"{i}.txt").write_text(called(subject, names))
    return folder


def called(subject: str, names: Sequence[str]) -> str:
    """Caption in which the subject has its new name."""
    return emoji.caption(*names).replace(f"a {subject}", TEXT)


def compositions(subject: str) -> list[tuple[str, str]]:
    """DRAWN pairs of the subject with named icons, on either side by turns."""
    known = [name for name in emoji.NAMED if name not in BESIDE]
    others = np.random.default_rng(2).choice(known, DRAWN)
    pairs = [(subject, str(other)) for other in others]
    return [pair if i % 2 else pair[::-1] for i, pair in enumerate(pairs)]


def numbers_trained(run: Path) -> int:
    """How many numbers the newest checkpoint of a run holds parameters of."""
    shapes = checkpoint.saved_shapes(run, None, "params")
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def share(true: Iterable[bool]) -> float:
    """Mean of what is true."""
    return float(np.mean(list(true)))


def markdown(
    taught: dict[str, list[dict]], words: dict[str, list[dict]], ceiling: float, options: Any
) -> str:
    """The page of results; means over the icons."""
    facts = machine.facts()
    lines = [
        "# New icons in the text model of emoji",
        "",
        f"`{facts['command']}` on {facts['date']}, {facts['commit']}, {facts['cores']} cores"
        f" ({facts['cpu']}). {options.steps} steps of DDIM, guidance {options.guidance_scale:g},"
        f" {DRAWN} pictures of each kind of prompt, {SHOTS} of each icon to learn from. Shares of"
        f" pictures that show what they should, to the nearest of 88 icons; of real pictures"
        f" through the first stage {ceiling:.3f}.",
        "",
        f"Means over {', '.join(f'{s} (class {OF_CLASS[s]})' for s in options.subjects)}, each"
        f" called {TEXT!r}. *in pairs*: the new icon at its place beside a second one, in prompts"
        " that were never shown; *both*: the second one too; *class*: the class's own prompt still"
        " draws it.",
        "",
        "| way | options | trained numbers | plain | in pairs | both | class before | after |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    columns = ("plain", "in pairs", "both", "class before", "class after")
    for name, rows in taught.items():
        figures = [f"{np.mean([row[column] for row in rows]):.3f}" for column in columns]
        said = WAYS[name].options.split(" --instance")[0]
        lines.append(f"| {name} | `{said}` | {rows[0]['trained']:,} | {' | '.join(figures)} |")
    lines += [
        "",
        "Textual inversion, one vector; *the first word alone*: the word that it starts as.",
        "",
        "| icons | trained numbers | its word | the first word alone |",
        "| --- | --- | --- | --- |",
    ]
    for name, rows in words.items():
        if rows:
            figures = [f"{np.mean([row[c] for row in rows]):.3f}" for c in ("word", "first word")]
            lines.append(f"| {name} | {rows[0]['trained']} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
