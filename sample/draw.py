"""From a request to files: the common part of all sampling tasks."""

import dataclasses
import json
from typing import Any

import jax
from etils import epath

from ldm_jax.runtime import images
from ldm_jax.runtime.log import LOG
from ldm_jax.sample import exported, generate, hosts, program, write
from ldm_jax.sample.request import Call, Request, calls_of, levels_of, scales_of

# facts of a PNG that may differ when a list goes on
CHANGES = ("made_with", "progress")
TERMS = {"call": "batch size and place in it", "index": "number", "files": "sha256 of files"}


def draw(what: Request) -> int:
    """Writes the images of a request, batch by batch, then grid and arrays; or exports its program.

    With --resume, batches whose images all exist are left out, and the result is that of an
    uninterrupted run. ValueError, after all images, for inputs that could not be read.
    """
    options, run, size = what.options, None, None
    if options.export is not None:
        exported.write(what)
        return 0
    if options.from_export is not None:
        run, size = exported.read(what)
    else:
        for one in generate.passes_of(what):  # refuses options that the sampler cannot use
            program.program_of(one, one.model)
    generate.batch_of(what)  # refuses --init-latents that do not fit, before there is a folder
    write.check_format(what)
    calls = calls_of(what, size)
    settings = write.settings_of(what, calls)
    out = write.open_out(options)
    left = calls
    if options.resume:
        with hosts.together():
            due = {id(call) for call in missing(out, what, calls, settings)}
        agreed = hosts.same([id(call) in due for call in calls])  # listings of storage may differ
        left = [call for call, again in zip(calls, agreed, strict=True) if again]
    written = what.count - sum(len(call.wanted) for call in left)
    if options.resume:
        LOG.info(f"{written} of {what.count} images are in {out} already")
    say_what_is_left_out(what)
    for one in generate.passes_of(what):
        say_steps(one)
    lost: list[str] = []
    try:
        with hosts.together():
            for part in generate.made(what, left, run) if left else ():
                lost += write.part(out, what, part, settings)
                written += len(part.call.wanted)
        with hosts.together():
            if jax.process_index() == 0:
                write.finish(out, what, calls)
        with hosts.together():
            refuse_lost(lost, what)
    except KeyboardInterrupt:
        write.remove_drafts(out)
        LOG.info(f"{written} of {what.count} images are in {out}; go on with --resume")
        raise
    shown = (write.grid_of(what) >= 0).sum()
    of = "" if shown == what.count else f" of {shown} of them"
    LOG.info(f"{what.count} images and {out / 'grid.png'}{of}; ldm-sample again IMAGE repeats one")
    if what.problems:
        raise ValueError("; ".join(what.problems))
    return 0


def say_steps(what: Request) -> None:
    """Log the number of steps that run, which may be another than was asked for."""
    t, options = levels_of(what).t[what.start or 0 :], what.options
    if len(t):
        spacing = f"{options.spacing} of {options.spacing_rule}"
        LOG.info(f"{options.solver}: {len(t)} steps, timesteps {t[0]:g} to {t[-1]:g} ({spacing})")


def refuse_lost(names: list[str], what: Request) -> None:
    """FloatingPointError for images that were drawn and not written, as they are not finite."""
    if not names:
        return
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    dtype = what.options.dtype
    hint = "" if dtype == "float32" else f", or --dtype float32 instead of {dtype}"
    raise FloatingPointError(
        f"{len(names)} of {what.count} images are not finite (NaN or infinity) and are not written:"
        f" {', '.join(names[:5])}{more}; try a smaller --guidance-scale{hint}"
    )


def say_what_is_left_out(what: Request) -> None:
    """Warn of a guidance scale of 0, by which other programs mean "without guidance" (here: 1)."""
    count = int((scales_of(what) == 0).sum()) if what.guided else 0
    if count:
        LOG.warning(
            f"guidance scale 0 leaves out what is asked for, in {count} of {what.count} images: 1"
            " samples with it, without guidance"
        )


def missing(
    out: epath.Path, what: Request, calls: list[Call], settings: list[dict[str, Any]]
) -> list[Call]:
    """Calls that must run again or for the first time.

    ValueError, naming the file and the setting, for an image of another list.
    """
    paths = [path for ending in images.ENDINGS.values() for path in out.glob(f"*{ending}")]
    there = {path.stem: path for path in paths if path.stem != "grid"}
    places = {name: place for place, name in enumerate(what.names)}
    fields = dataclasses.fields(what.options)
    defaults = json.loads(json.dumps({f.name: f.default for f in fields}, default=str))
    for name, path in sorted(there.items()):
        if name not in places:
            raise ValueError(
                f"--resume: {path} is none of the images of this list, which begins with"
                f" {what.names[0]}{path.suffix}: repeat the command as it was, or give another"
                " --out"
            )
        check_same(path, settings[places[name]], defaults)

    def done(call: Call) -> bool:
        names = [what.names[place] for place in call.places[call.wanted]]
        latents = not what.options.save_latents or write.has_latents(out, call)
        previews = [out / "previews" / f"{name}.png" for name in names if what.options.preview]
        shown = all(path.exists() for path in previews)
        return latents and shown and all(name in there for name in names)

    return [call for call in calls if not done(call)]


def check_same(path: epath.Path, wanted: dict[str, Any], defaults: dict[str, Any]) -> None:
    """ValueError if an image was made with other settings than `wanted`, naming the first.

    defaults: of options, for those that are younger than the image.
    """
    recorded = write.read_settings(path)
    for name in {**wanted, **recorded}:
        here, there = wanted.get(name), recorded.get(name)
        unused = name not in recorded and (not here or here == defaults.get(name))
        if name not in CHANGES and here != there and not unused:
            raise ValueError(
                f"--resume: {path} was made with {TERMS.get(name, name)} {json.dumps(there)}, and"
                f" here it is {json.dumps(here)}: repeat the command as it was, or give another"
                " --out"
            )
