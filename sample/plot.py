"""Pictures of a text for every value of some options, in one sheet: `ldm-sample plot`.

    ldm-sample plot --model PATH --out DIR --prompt "a red fox" --across "steps: 10, 20, 40" \\
        --down "cfg: 1-10 [4]" --sheets "prompt: red, blue"

Numbers are lists of `3`, `1-5`, `1-5 (+2)` (every second) and `1-10 [5]` (so many, evenly). Each
picture is one of `ldm-sample text2img`, and repeated as such.
"""

import csv
import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from tyro.conf import arg

from ldm_jax import bundle
from ldm_jax.prompting import parameters
from ldm_jax.runtime import images
from ldm_jax.runtime.log import LOG
from ldm_jax.sample import draw, generate, hires, hosts, text2img, write
from ldm_jax.sample.options import load_model
from ldm_jax.sample.request import Request, calls_of, indices_of, scales_of, seeds_of

MOST = 400
"""Most pictures."""
Axis = Annotated[str | None, arg(metavar='"NAME: VALUES"')]


@dataclasses.dataclass(frozen=True)
class Options(text2img.Options):
    """A picture of a text for every value of an option, or of several."""

    num_images: int = 1
    """One for every value."""
    across: Axis = None
    """Values from left to right, of seed, steps, cfg, prompt (the first of its values is searched
    in the prompts, and replaced by each), sampler, schedule, clip skip, denoising (of
    --hires-scale) or size (512x768, width x height)."""
    down: Axis = None
    """From top to bottom."""
    sheets: Axis = None
    """From sheet to sheet."""


class Value(NamedTuple):
    """A value of an axis."""

    label: str
    change: Callable[[text2img.Options], text2img.Options]


def main(options: Options) -> int:
    """Writes a picture for every value, and grid.png, or a grid for each of --sheets."""
    axes = [values_of(f, getattr(options, f)) for f in ("sheets", "down", "across")]
    check(options, axes)
    with hosts.together():
        cells, parts = requests(options, axes)
        out = write.open_out(options)
    lost: list[str] = []
    with hosts.together():
        for what in parts:
            calls = calls_of(what)
            settings = write.settings_of(what, calls)
            draw.say_steps(what)
            for part in generate.made(what, calls):
                lost += write.part(out, what, part, settings)
    with hosts.together():
        if jax.process_index() == 0:
            write_sheets(out, options, axes, cells)
        draw.refuse_lost(lost, parts[0])
    LOG.info(f"{len(cells)} images and a sheet in {out}; ldm-sample again IMAGE repeats one")
    return 0


def check(options: Options, axes: Sequence[Sequence[Value]]) -> None:
    """ValueError for options that a plot does not have."""
    if options.num_images != 1 or len(options.prompt) != 1 or options.prompt_file is not None:
        raise ValueError("a plot is of one --prompt, and has one image for every value")
    for name in ("resume", "export", "from_export", "save_latents", "npz", "preview"):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} is not for a plot")
    given = (options.across, options.down, options.sheets)
    denoising = any(one and one.lower().startswith("denoising") for one in given)
    if denoising and not hires.asked(options):
        raise ValueError("denoising is that of a hires fix: give --hires-scale")
    count = int(np.prod([len(axis) for axis in axes]))
    if count < 2:
        raise ValueError('give --across "NAME: VALUES", --down or --sheets')
    if count > MOST:
        raise ValueError(f"the values make {count} images, {MOST} at most")


def requests(options: Options, axes: Sequence[Sequence[Value]]) -> tuple[list[str], list[Request]]:
    """(name of each picture, requests of all of them, each of one program)."""
    known: dict[str, bundle.LatentDiffusion] = {}

    def load(asked: Any, mesh: Any) -> bundle.LatentDiffusion:
        key = repr((asked.lora, asked.embedding, asked.clip_skip))
        if key not in known:
            known[key] = load_model(asked, mesh)
        return known[key]

    names, groups = [], {}
    plain = {f.name: getattr(options, f.name) for f in dataclasses.fields(text2img.Options)}
    for number, values in enumerate(itertools.product(*axes)):
        asked = text2img.Options(**plain)
        for value in values:
            asked = value.change(asked)
        what = text2img.request(asked, load)
        label = text2img.slug(" ".join(value.label for value in values))
        names.append(f"{number:05d}_{label}_seed{asked.seed}")
        what = dataclasses.replace(what, names=[names[-1]], row_labels=())
        same = dataclasses.replace(
            what.options, seed=0, guidance_scale=1.0, prompt=(), negative_prompt=""
        )
        shapes = [(name, x.shape[1:]) for name, x in sorted(what.batch.items())]
        groups.setdefault(repr((same, what.shape, shapes)), []).append(what)
    return names, [joined(group) for group in groups.values()]


def joined(parts: Sequence[Request]) -> Request:
    """One request of the images of several, whose programs are the same."""
    first, second = parts[0], parts[0].second
    if second is not None:
        second = second._replace(request=joined([one.second.request for one in parts]))
    return dataclasses.replace(
        first,
        guided=any(one.guided for one in parts),
        batch={name: np.concatenate([one.batch[name] for one in parts]) for name in first.batch},
        names=[name for one in parts for name in one.names],
        details=[detail for one in parts for detail in one.details],
        seeds=np.concatenate([seeds_of(one) for one in parts]),
        indices=np.concatenate([indices_of(one) for one in parts]),
        scales=np.concatenate([scales_of(one) for one in parts]),
        second=second,
    )


def write_sheets(
    out: Any, options: Options, axes: Sequence[Sequence[Value]], cells: Sequence[str]
) -> None:
    """grid.png, or grid_0.png, ... of the sheets: the values on top and at the left."""
    sheets, down, across = axes
    of_sheet = len(down) * len(across)
    for number in range(len(sheets)):
        shown = []
        for name in cells[number * of_sheet : (number + 1) * of_sheet]:
            path = write.path_of(out, options, name)
            shown.append(images.read_written(path) if path.exists() else np.zeros((1, 1, 3)))
        height, width = (max(one.shape[axis] for one in shown) for axis in (0, 1))
        cell = np.full((len(shown), height, width, 3), 255, np.uint8)
        for whole, one in zip(cell, shown, strict=True):
            whole[: one.shape[0], : one.shape[1]] = one
        # PIL's font has no other letters
        titles = [value.label.encode("ascii", "replace").decode() for value in across]
        rows = [" ".join(filter(None, (sheets[number].label, row.label))) for row in down]
        labels = [row.encode("ascii", "replace").decode() for row in rows]
        sheet = images.grid(
            cell, len(across), scale=max(1, 96 // height), names=labels, titles=titles
        )
        name = "grid.png" if len(sheets) == 1 else f"grid_{number}.png"
        images.save_png(out / name, sheet, {"task": "plot", "grid": len(cells)})


# --- axes -----------------------------------------------------------------------------------------


def values_of(flag: str, text: str | None) -> list[Value]:
    """Values of an axis; one that changes nothing for none. ValueError for what is no axis."""
    if text is None:
        return [Value("", lambda options: options)]
    name, colon, rest = text.partition(":")
    name = name.strip().lower()
    if not colon or name not in AXES:
        raise ValueError(f'--{flag} {text!r:.60}: give "NAME: VALUES" of {", ".join(AXES)}')
    try:
        given = next(csv.reader([rest], skipinitialspace=True, strict=True), [])
        values = AXES[name]([one.strip() for one in given if one.strip()])
    except (csv.Error, ValueError) as error:
        raise ValueError(f"--{flag} {text!r:.60}: {error}") from error
    if not values:
        raise ValueError(f"--{flag} {text!r:.60}: names no value")
    return values


def _numbers(field: str, kind: type) -> Callable[[list[str]], list[Value]]:
    """Values of an option that is a number."""

    def read(given: list[str]) -> list[Value]:
        found = [number for one in given for number in numbers(one, kind)]
        return [Value(f"{field_shown(field)} {n:g}", _changed(field, n)) for n in found]

    return read


def field_shown(field: str) -> str:
    """The name of an option on a sheet."""
    shown = {"guidance_scale": "cfg", "hires_strength": "denoising", "clip_skip": "clip skip"}
    return shown.get(field, field)


def _changed(field: str, value: Any) -> Callable[[text2img.Options], text2img.Options]:
    return lambda options: dataclasses.replace(options, **{field: value})


NUMBER = r"-?\d+(?:\.\d+)?"
RANGE = re.compile(
    rf"({NUMBER})\s*-\s*({NUMBER})\s*(?:\(\s*\+?\s*({NUMBER})\s*\)|\[\s*(\d+)\s*\])?"
)


def numbers(text: str, kind: type) -> list[Any]:
    """`3`, `1-5`, `1-5 (+2)` or `1-10 [5]` as numbers; whole ones are rounded down."""
    match = RANGE.fullmatch(text)
    if match is None:
        return [kind(text)]
    first, last, step, count = match.groups()
    low, high = float(first), float(last)
    if count is not None:
        number = int(count)
        _refuse_many(text, number)
        return [kind(x) for x in np.linspace(low, high, number).round(9)]
    by = float(step) if step is not None else 1.0 if high >= low else -1.0
    if by == 0 or (high - low) * by < 0:
        raise ValueError(f"{text}: does not lead from {low:g} to {high:g}")
    number = int((high - low) / by + 1e-9) + 1
    _refuse_many(text, number)
    return [kind(round(low + i * by, 9)) for i in range(number)]


def _refuse_many(text: str, count: int) -> None:
    if count > MOST:
        raise ValueError(f"{text}: {count} values, {MOST} at most")


def _words(given: list[str]) -> list[Value]:
    """Prompts whose first word is replaced by each."""

    def change(word: str) -> Callable[[text2img.Options], text2img.Options]:
        def replaced(options: text2img.Options) -> text2img.Options:
            texts = (*options.prompt, options.negative_prompt)
            if not any(given[0] in text for text in texts):
                raise ValueError(f"{given[0]!r:.40} is not in the prompts, and cannot be replaced")
            *prompts, away = (text.replace(given[0], word) for text in texts)
            return dataclasses.replace(options, prompt=tuple(prompts), negative_prompt=away)

        return replaced

    return [Value(word, change(word)) for word in given]


def _named(field: str, shown: dict[str, str]) -> Callable[[list[str]], list[Value]]:
    """Values of an option by our names, or webui's."""
    names = {name.lower(): value for value, name in shown.items()}

    def read(given: list[str]) -> list[Value]:
        return [Value(one, _changed(field, names.get(one.lower(), one.lower()))) for one in given]

    return read


def _sizes(given: list[str]) -> list[Value]:
    found = []
    for one in given:
        sides = re.fullmatch(r"(\d+)\s*x\s*(\d+)", one)
        if sides is None:
            raise ValueError(f"{one}: give WIDTHxHEIGHT")
        width, height = map(int, sides.groups())
        change = lambda o, w=width, h=height: dataclasses.replace(o, width=w, height=h)  # noqa: E731
        found.append(Value(one, change))
    return found


AXES: dict[str, Callable[[list[str]], list[Value]]] = {
    "seed": _numbers("seed", int),
    "steps": _numbers("steps", int),
    "cfg": _numbers("guidance_scale", float),
    "prompt": _words,
    "sampler": _named("solver", parameters.SAMPLERS),
    "schedule": _named("spacing", parameters.SCHEDULES),
    "clip skip": _numbers("clip_skip", int),
    "denoising": _numbers("hires_strength", float),
    "size": _sizes,
}
"""{name: texts -> values}, with webui's long names too."""
AXES |= {"cfg scale": AXES["cfg"], "prompt s/r": _words, "schedule type": AXES["schedule"]}
