"""Images with their settings inside, grids and arrays, in the folder that --out names.

OUT/NAME.png            as soon as its batch is done; complete, or missing; or .jpg, .webp
OUT/previews/NAME.png   with --preview
OUT/latents/00000.npy   with --save-latents: of one batch, until all are in latents.npy
OUT/grid.png, samples.npz, latents.npy
"""

import functools
import importlib.metadata
import json
import math
import typing
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ldm_jax import finite
from ldm_jax.data.folder import SUFFIXES
from ldm_jax.prompting import parameters
from ldm_jax.runtime import flags, images, reading, rundir, storage
from ldm_jax.sample import adapters, hosts
from ldm_jax.sample.generate import Made
from ldm_jax.sample.options import Options
from ldm_jax.sample.request import Call, Request, indices_of, seeds_of
from ldm_jax.schema import serialize

GRID = 400
"""Most images in a grid."""
COLUMNS = 40
"""Most images in a row of the grid."""
FORMAT = 2
"""Format of the settings in a PNG; those of November 2026 have no number."""
# options about output and display, which do not change an image
OUTPUT = (
    "out", "save_latents", "npz", "overwrite", "resume", "export", "export_platforms",
)  # fmt: skip

# files of which an image uses one line, or that can be made again
LISTS = ("prompt_file", "index_file", "styles")


def open_out(options: Options) -> epath.Path:
    """The output folder, writable and without samples in it unless --overwrite or --resume.

    ValueError in every process if one of them refuses it, or sees another folder there.
    """
    with hosts.together():
        out = _open_out(options)
    hosts.check_shared(out)
    return out


def path_of(out: epath.Path, options: Options, name: str) -> epath.Path:
    """File of an image."""
    return out / f"{name}{images.ENDINGS[options.image_format]}"


def check_format(request: Request) -> None:
    """ValueError for a format that cannot hold the images, or not what else is made of them."""
    options = request.options
    if options.image_format == "png":
        return
    if not 1 <= options.image_quality <= 100:
        raise ValueError(f"--image-quality {options.image_quality} is not in 1..100")
    if options.npz:
        raise ValueError(
            f"--npz holds exact images: leave out --image-format {options.image_format}"
        )
    stage = request.model.config.first_stage
    if options.image_format == "webp" and getattr(stage, "in_channels", stage.embed_dim) == 1:
        raise ValueError("--image-format webp has no grey pictures: take png or jpeg")


def _open_out(options: Options) -> epath.Path:
    out = epath.Path(options.out)
    if options.resume and options.overwrite:
        raise ValueError("--resume keeps what --overwrite replaces: give one of them")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    if rundir.is_run(out):
        raise ValueError(f"--out {out} is a run; give another folder")
    refuse_foreign(out)
    keeps = options.overwrite or options.resume
    if (
        out.exists()
        and not keeps
        and any(any(out.glob(f"*{ending}")) for ending in images.ENDINGS.values())
    ):
        raise ValueError(
            f"--out {out} already holds images; --resume goes on with them; or give another folder"
            " or --overwrite"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be made: {error.strerror}") from error
    # tried by writing: permissions do not tell for root, some file systems, and buckets
    probe = out / f".writable{jax.process_index()}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"--out {out} cannot be written: {error.strerror}; give another folder"
        ) from error
    return out


def refuse_foreign(out: epath.Path, depth: int = 2, own: Sequence[str] = ()) -> None:
    """ValueError for a folder with pictures in it, or in `depth` levels below, that are not ours.

    What is written into a training set would be trained on. own: names of pictures that commands
    write without settings, beside those in a folder `previews`.
    """
    for path in pictures_in(out, depth) if out.is_dir() else ():
        if path.parent.name == "previews" or path.name in own:
            continue
        try:
            images.read_settings(path)
        except ValueError as error:
            name = path.relative_to(out)
            raise ValueError(
                f"--out {out} holds pictures that no command wrote ({name}); give another folder"
            ) from error


def pictures_in(folder: epath.Path, depth: int = 2) -> Iterator[epath.Path]:
    """Image files in a folder and in `depth` levels of folders below it, by name."""
    try:
        paths = sorted(folder.iterdir())
    except OSError:  # what cannot be listed, as a folder of another user
        return
    for path in paths:
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in SUFFIXES:
            yield path
        elif depth and path.is_dir():
            yield from pictures_in(path, depth - 1)


# --- settings -------------------------------------------------------------------------------------


def settings_of(request: Request, calls: Iterable[Call]) -> list[dict[str, Any]]:
    """Settings in the PNG of each image: enough to draw it again, and alone.

    The task, the options that matter to this image, its number under its seed, "call" (size of the
    program's batch, and its place in it), "files" ({path: sha256} of what it was made from)
    and "made_with".
    """
    shared = {name: x for name, x in vars(request.options).items() if name not in OUTPUT}
    shared = {
        "format": FORMAT,
        "task": request.task,
        **shared,
        "guided": request.guided,
        "made_with": made_with(),
    }
    where = {
        place: [len(call.places), int(i)]
        for call in calls
        for i, place in zip(call.wanted, call.places[call.wanted].tolist(), strict=True)
    }
    known: dict[str, str] = {}
    result = []
    numbers = zip(seeds_of(request).tolist(), indices_of(request).tolist(), strict=True)
    for place, (seed, index) in enumerate(numbers):
        own = {
            **shared,
            "seed": seed,
            **request.details[place],
            "index": index,
            "call": where[place],
        }
        if request.alone:
            own |= {"num_images": 1, "first_index": index}
        paths = input_files(type(request.options), own)
        for path in paths:
            known.setdefault(path, storage.sha256(path))
        own["files"] = {path: known[path] for path in paths}
        result.append(json.loads(json.dumps(own)))
    return result


def read_settings(path: epath.PathLike) -> dict[str, Any]:
    """The settings in a PNG, those of older formats converted to this one.

    ValueError if the file carries none, or those of a newer format.
    """
    settings = images.read_settings(path)
    with reading.refusals(path, "it is not as ldm-sample wrote it"):
        version = serialize.typed(settings.get("format", 1), int, "format")
        if version > FORMAT:
            raise ValueError(
                f"{path}: its settings have format {version}, newer than {FORMAT}; install a newer"
                " ldm_jax"
            )
        if version == 1:  # when seeds counted modulo 2**32
            settings |= {"format": FORMAT, "seed": settings.get("seed", 0) % 2**32}
            if "seeds" in settings:
                settings["seeds"] = [seed % 2**32 for seed in settings["seeds"]]
        settings.setdefault("spacing_rule", "compvis")  # the only one before it had a name
        settings.setdefault("clip_skip", 1)
    return settings


def input_files(kind: type, values: Mapping[str, Any]) -> list[str]:
    """The files that an image depends on, by the options of its task; folders are not counted."""
    paths = [path for name in file_options(kind) for path in listed(values[name])]
    paths += adapters.files(listed(values.get("lora")), listed(values.get("embedding")))
    return [path for path in paths if path != "coco"]  # names of classes that need no file


@functools.cache
def file_options(kind: type) -> tuple[str, ...]:
    """Names of the options of a task that hold input files."""
    hints = typing.get_type_hints(kind, include_extras=True)
    files = [name for name, hint in hints.items() if hint in (flags.Files, flags.OptionalFile)]
    return tuple(name for name in files if name not in (*OUTPUT, *LISTS))


def made_with() -> dict[str, str]:
    """Software and device that the last bit of an image may depend on."""
    device = jax.devices()[0]
    return {
        "ldm_jax": importlib.metadata.version("ldm_jax"),
        "jax": jax.__version__,
        "device": f"{jax.device_count()} {device.device_kind}",
    }


def listed(value: str | Sequence[str] | None) -> list[str]:
    """The paths that an option of one, several or none holds."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


# --- files ----------------------------------------------------------------------------------------


def part(
    out: epath.Path, request: Request, made: Made, settings: list[dict[str, Any]]
) -> list[str]:
    """Write the files of one call's images; the PNGs last, so that a PNG marks complete files.

    Every process writes its own images, the first one the latents of all. An image that is not
    finite is not written, nor are the latents of its call; returns the names of these images.
    """
    sound = images.finite_images(made.image)
    if made.previews is not None:
        sound &= images.finite_images(made.previews)
    lost = [request.names[place] for place in made.places[~sound]]
    for name in lost:  # remove an earlier one too
        for path in (path_of(out, request.options, name), out / "previews" / f"{name}.png"):
            path.unlink(missing_ok=True)
    keeps_latents = request.options.save_latents and finite.is_finite(made.latent)
    if keeps_latents and jax.process_index() == 0:
        path = latents_path(out, made.call)
        path.parent.mkdir(exist_ok=True)
        draft = path.parent / f".{path.name}.part"
        with draft.open("wb") as file:
            np.save(file, made.latent.astype(np.float32))
        draft.replace(path)
    if made.previews is not None:
        previews = images.to_uint8(made.previews[sound])
        for place, shown in zip(made.places[sound], previews, strict=True):
            strip = images.grid(shown, len(shown))
            images.save_png(out / "previews" / f"{request.names[place]}.png", strip)
    pictures, options = images.to_uint8(made.image[sound]), request.options
    for place, picture in zip(made.places[sound], pictures, strict=True):
        kept = settings[place]
        text = parameters.written(kept, picture.shape[:2]) if "prompt" in kept else None
        given = (options.image_format, kept, text, options.image_quality)
        path = path_of(out, options, request.names[place])
        storage.write_whole(path, images.encoded(picture, *given))
    return lost


def latents_path(out: epath.Path, call: Call) -> epath.Path:
    """Latents of one call, until those of all are in one file."""
    return out / "latents" / f"{call.places[call.wanted[0]]:05d}.npy"


def finish(out: epath.Path, request: Request, calls: list[Call]) -> None:
    """Grid and arrays, from the files of the images, a few in memory at a time.

    Where images are missing, as they are not finite, the grid has gaps and there are no arrays.
    """
    there = [name for name in request.names if path_of(out, request.options, name).exists()]
    old = ("grid.png", "samples.npz", *("latents.npy",) * request.options.overwrite)
    for name in old:
        (out / name).unlink(missing_ok=True)
    if there:
        write_grid(out, request, set(there))
    if len(there) < request.count:
        return
    if request.options.npz:
        write_npz(out, request)
    if request.options.save_latents and (out / "latents").exists():
        write_latents(out, request, calls)


def remove_drafts(out: epath.Path) -> None:
    """Remove the drafts of interrupted writes."""
    for draft in (*out.glob(".*.part"), *out.glob("*/.*.part")):
        draft.unlink()


def read_picture(out: epath.Path, options: Options, name: str) -> np.ndarray:
    """uint8 [H, W, c] of an image that was written."""
    return images.read_written(path_of(out, options, name))


def write_grid(out: epath.Path, request: Request, there: set[str]) -> None:
    """grid.png of the first images, a row for each of its labels, or a square.

    there: the names of the images that have been written; the others are left white.
    """
    table = grid_of(request)
    names = [request.names[i] if i >= 0 else "" for i in table.flat]
    read = functools.partial(read_picture, out, request.options)
    first, columns = read(min(there)), table.shape[1]
    blank = np.full_like(first, 255)
    shown = [read(name) if name in there else blank for name in names]
    if request.left is not None:
        left = images.to_uint8(request.left[: len(table)])
        left = left[:, None] if left.ndim == 4 else left
        rows = [[*a, *shown[i * columns : (i + 1) * columns]] for i, a in enumerate(left)]
        shown, columns = [picture for row in rows for picture in row], columns + left.shape[1]
    # PIL's font has no other letters
    labels = [row.encode("ascii", "replace").decode() for row in request.row_labels[: len(table)]]
    scale = max(1, 48 // first.shape[0])
    sheet = images.grid(np.stack(shown), columns, scale=scale, names=labels)
    shared = {name: x for name, x in vars(request.options).items() if name not in OUTPUT}
    images.save_png(
        out / "grid.png", sheet, {"task": request.task, **shared, "grid": request.count}
    )


def grid_of(request: Request) -> np.ndarray:
    """Places of the images in the grid, int [rows, columns], cut to GRID; -1 where none is."""
    count = request.count
    if not request.row_labels:
        columns = math.ceil(min(count, GRID) ** 0.5)
        lengths = [columns] * (count // columns) + ([count % columns] if count % columns else [])
    else:
        number = len(request.row_labels)
        lengths = request.row_lengths or [count // number] * number
    table = np.full((len(lengths), max(lengths)), -1)
    first = 0
    for row, length in enumerate(lengths):
        table[row, :length] = np.arange(first, first + length)
        first += length
    table = table[:, :COLUMNS]
    return table[: GRID // table.shape[1]]


def write_npz(out: epath.Path, request: Request) -> None:
    """samples.npz: arr_0 uint8 [N, H, W, c]."""
    shape = (request.count, *read_picture(out, request.options, request.names[0]).shape)
    draft = out / ".samples.npz.part"
    with (
        draft.open("wb") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member,
    ):
        write_header(member, shape, np.uint8)
        for name in request.names:
            member.write(read_picture(out, request.options, name).tobytes())
    draft.replace(out / "samples.npz")


def write_latents(out: epath.Path, request: Request, calls: list[Call]) -> None:
    """Join the calls' files into latents.npy, float32 [N, h, w, c], and remove them."""
    draft = out / ".latents.npy.part"
    with draft.open("wb") as file:
        write_header(file, (request.count, *request.last.shape), np.float32)
        for call in calls:
            file.write(read_latents(out, call).tobytes())
    draft.replace(out / "latents.npy")
    (out / "latents").rmtree()


def has_latents(out: epath.Path, call: Call) -> bool:
    """True if the latents of a call have been written."""
    return latents_path(out, call).exists() or (out / "latents.npy").exists()


def read_latents(out: epath.Path, call: Call) -> np.ndarray:
    """Latents of a call, also from latents.npy of a finished list that goes on."""
    path = latents_path(out, call)
    if path.exists():
        return np.load(path)
    return np.load(out / "latents.npy")[call.places[call.wanted]]


def write_header(file: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """Write the header of an .npy file whose values follow."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
