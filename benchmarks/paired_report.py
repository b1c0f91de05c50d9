"""The pages of `paired.py`: tables from the figures of all its processes."""

import functools
import itertools
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import cases
from cases import CACHE, IMAGES, OURS, TORCH

LONG = 50  # steps of the image that the last column is for
UNET_NOTE = """\
Seconds, medians over processes of the median run; ratio: ldm_jax over diffusers, below 1 is faster\
 here.
Difference: the largest between any two processes' outputs (training: losses of the first three\
 steps), relative to the largest output."""
SAMPLING_NOTE = """\
Medians over processes of the median run. A step is of the whole batch; an image is all steps of\
 the case and the decoder, over the batch; for 50 steps it is 50 times the step and the decoder\
 where the case has fewer. Peak: largest {memory} memory while sampling, weights included.\
 Difference: largest from ldm_jax's image, relative to its largest value. Compilation is that of a\
 first process, tracing included (torch: the first run less the median one). Load: the largest load\
 average before or after a process; figures above the number of threads are of a busy machine."""
SPLIT_NOTE = """\
Of one further run under a profiler, which slows it down: read shares (how: README.md beside the\
 script). torch.compile fuses what is elementwise, the norms' part too, into kernels that count as\
 norm if they hold one."""
ATTENTION_NOTE = """\
Milliseconds (goal: at most 3 times torch's): of one of 8 in a row, as in a network, and of a call\
 of its own, which for ldm_jax is that of a compiled program. `text`: over the 77 tokens of a\
 prompt."""
PEAK_NOTE = """\
A product of {matrix}x{matrix} matrices in the type of the run: {measured} GFLOP/s. Operations of\
 the model are those of its convolutions and products, counted in our traced program."""
FIRST_STAGE_NOTES = {
    cases.TrainStep: "Seconds of a training step of generator and discriminator (first stage with"
    " LPIPS on VGG16, PatchGAN of 3 layers, two Adams); ratio: ldm_jax over torch, below 1 is"
    " faster here.",
    cases.Encode: "Images encoded per second: the encoder alone, and `ldm-train encode` from record"
    " to shard. Ratio: ldm_jax over torch, above 1 is faster here.",
    cases.LatentTraining: "Training images per second of the latent diffusion recipe: encoding the"
    " images of every batch, and reading latents that were encoded once.",
}


# --- figures and cells ---------------------------------------------------------------------------


def part_of(case: dict, side: str, part: str = "run") -> dict:
    """Figures of a part of a side; empty if it was not measured."""
    return case.get(side, {}).get("parts", {}).get(part, {})


def seconds(case: dict, side: str, part: str = "run") -> float:
    """The median over a side's processes of the median run; NaN if it was not measured."""
    runs = part_of(case, side, part).get("runs", ())
    return statistics.median([run["median"] for run in runs] or [float("nan")])


def cells(form: str, *values: float | None) -> list[str]:
    """The values in a format; empty where there is none."""
    return ["" if x is None or x != x else format(x, form) for x in values]


def cell(form: str, *values: float | None) -> str:
    return ", ".join(cells(form, *values))


def difference(case: dict) -> str:
    return f"{max(entry['difference'] for entry in case.values()):.0e}"


def compiling(case: dict, side: str, part: str = "run") -> float | None:
    """Seconds of compilation."""
    return part_of(case, side, part).get("compile")


def table(head: Iterable[str], rows: list, words: int = 1, wide: bool = False) -> str:
    """Markdown; the first `words` columns are set left, the others hold numbers."""
    head, space = list(head), " " if wide else ""
    marks = ["---"] * words + ["---:"] * (len(head) - words)
    head, *rows = ("| " + " | ".join(row) + " |" for row in (head, *rows))
    return "\n".join((head, f"|{space}" + f"{space}|{space}".join(marks) + f"{space}|", *rows))


def page(*blocks: str) -> str:
    return "\n\n".join(blocks) + "\n"


def about(machine: dict, *skip: str) -> str:
    return ", ".join(f"{k} {v}" for k, v in machine.items() if k not in ("command", *skip)) + "."


def machines(report: dict) -> Iterator[str]:
    """Each run's command, and what it ran on."""
    for machine in report["machines"]:
        yield from (f"`{machine['command']}`", about(machine))


def cases_of_kind(report: dict, kind: type) -> list[tuple[str, Any, dict]]:
    """(name, case, its figures by side) of one kind of case."""
    named = [(name, cases.CASES[name], case) for name, case in report["cases"].items()]
    return [row for row in named if isinstance(row[1], kind)]


def split_rows(case: dict, part: str, words: list[str], steps: int = 1) -> list[list[str]]:
    """A row of seconds by kind of operation for each side that was measured so."""
    splits = {side: part_of(case, side, part).get("split") for side in case}
    return [
        [*words, side, *(f"{split[kind] / steps:.3f}" for kind in cases.KINDS)]
        for side, split in splits.items()
        if split
    ]


def processes(report: dict, name: str, side: str) -> list[dict]:
    """Peak memory and load of the processes of a side of a case."""
    return [p for p in report["processes"] if (p["case"], p["side"]) == (name, side)]


# --- the UNet ------------------------------------------------------------------------------------


def unet_page(
    report: dict, title: str = "Stable Diffusion v1 UNet: ldm_jax against diffusers on torch"
) -> str:
    """Times and ratios, then the split by kind of operation, then processes."""
    measured = {side for case in report["cases"].values() for side in case}
    sides = [side for side in cases.SIDES[cases.UNet] if side in measured]
    times, splits = [], []
    for name, case in report["cases"].items():
        ratio = seconds(case, OURS) / seconds(case, cases.DIFFUSERS)
        row = [name, *cells(".3f", *(seconds(case, side) for side in sides)), *cells(".2f", ratio)]
        times.append([*row, difference(case), *cells(".0f", compiling(case, OURS))])
        splits += split_rows(case, "run", [name])
    loads = [
        [p["side"], p["case"], *cells(".1f", p["peak_gib"], *p["load"])]
        for p in report["processes"]
    ]
    kinds = ["AdamW" if kind == cases.OUTSIDE else kind for kind in cases.KINDS]
    return page(
        f"# {title}",
        *machines(report),
        UNET_NOTE,
        table(["case", *sides, "ratio", "difference", "compilation"], times),
        "Seconds of one run by kind of operation (how: README.md beside the script):",
        table(["case", "side", *kinds], splits, 2),
        table(["process", "cases", "peak memory GiB", "load before", "load after"], loads, 2),
    )


# --- sampling ------------------------------------------------------------------------------------


def sampling_page(report: dict) -> str:
    """Times and ratios, kinds of operation, attention alone, shares of the peak."""
    when = "; ".join(f"`{m['command']}`, {m['date']}, {m['commit']}" for m in report["machines"])
    found = cases_of_kind(report, cases.Sampling)
    alone = [operations(found, *one) for _, *one in cases_of_kind(report, cases.Operations)]
    return page(
        "# Sampling with Stable Diffusion v1: ldm_jax against diffusers on torch",
        f"{when}.",
        about(report["machines"][-1], "date", "commit"),
        *(sampling_times(report, found) if found else ()),
        *sampling_kinds(found),
        *itertools.chain(*alone),
    )


def step_decode_image(case: cases.Sampling, figures: dict, side: str) -> list[float]:
    """Seconds of one step of the batch, of its decoder, and of both for all steps of the case."""
    steps, decode = (seconds(figures, side, part) for part in ("steps", "decode"))
    return [steps / case.steps, decode, steps + decode]


def sampling_times(report: dict, found: list) -> Iterator[str]:
    """Seconds per step and per image, memory, compilation; ratios to the faster torch."""
    rows, ratios = [], []
    for name, case, figures in found:
        took = {side: step_decode_image(case, figures, side) for side in figures}
        for side, entry in figures.items():
            step, decode, _ = took[side]
            images = [(n * step + decode) / case.batch for n in (case.steps, LONG)]
            ran = processes(report, name, side)
            row = [name, side, *cells(".3f", step, decode, *images)]
            row += cells(".0f", *(compiling(figures, side, part) for part in ("steps", "decode")))
            row += [f"{max(p['peak_gib'] for p in ran):.2f}", f"{entry['difference']:.0e}"]
            rows.append([*row, f"{max(max(p['load']) for p in ran):.1f}"])
        ours = took.pop(OURS, None)
        if ours and took:
            best = [min(values) for values in zip(*took.values(), strict=True)]
            over = [a / b for a, b in zip(ours, best, strict=True)]
            ratios.append([name, *cells(".2f", *over), min(took, key=lambda side: took[side][0])])
    memory = {"cpu": "resident", "gpu": "on the device"}[report["machines"][-1]["platform"]]
    head = ["case", "side", "step, s", "decode, s", "image, s", f"image of {LONG} steps, s"]
    head += ["compile steps, s", "compile decoder, s", "peak, GiB", "difference", "load"]
    yield "## Times"
    yield "; ".join(f"{name}: {described(case)}" for name, case, _ in found) + "."
    yield SAMPLING_NOTE.format(memory=memory)
    yield table(head, rows, 2, wide=True)
    yield "Over the faster torch (goal on CPU: at most 1.6):"
    yield table(["case", "step", "decode", "image", "faster torch, step"], ratios, wide=True)


def described(case: cases.Sampling) -> str:
    """A case in words."""
    guided = f"guidance {cases.GUIDANCE}" if case.guided else "no guidance"
    return (
        f"UNet of {case.model_channels} and decoder of"
        f" {cases.DECODER_CHANNELS[case.model_channels]} channels, batch {case.batch},"
        f" {8 * case.size}x{8 * case.size} pixels, {case.steps} DDIM steps, {guided}"
    )


def sampling_kinds(found: list) -> Iterator[str]:
    """Seconds by kind of operation, of the steps and of the decoder."""
    rows = []
    for name, case, figures in found:
        rows += split_rows(figures, "steps", [name, "step"], case.steps)
        rows += split_rows(figures, "decode", [name, "decode"])
    names = {"dense": "matmul", "norms": "norm", cases.OUTSIDE: "solver"}
    if rows:
        yield "## Seconds by kind of operation"
        yield SPLIT_NOTE
        head = ["case", "", "side", *(names.get(kind, kind) for kind in cases.KINDS)]
        yield table(head, rows, 3, wide=True)


def operations(found: list, case: cases.Operations, figures: dict) -> Iterator[str]:
    """Attention alone, and operations per second over those of one large matrix product."""
    if OURS in figures and TORCH in figures:
        rows = []
        for where in [p.removesuffix("/one") for p in figures[OURS]["parts"] if p.endswith("/one")]:
            rows.append([where])
            for part, times in (("row", cases.IN_A_ROW), ("one", 1)):
                both = [seconds(figures, s, f"{where}/{part}") / times for s in (OURS, TORCH)]
                rows[-1] += cells(".2f", *(1e3 * x for x in both), both[0] / both[1])
        yield "## Attention alone"
        yield ATTENTION_NOTE
        head = ["case", OURS, TORCH, "ratio", f"{OURS}, a call", f"{TORCH}, a call", "ratio"]
        yield table(head, rows, wide=True)
    products = {side: part_of(figures, side, "product") for side in figures}
    rates = {s: p["flops"] / min(run["least"] for run in p["runs"]) for s, p in products.items()}
    peak, rows = max(rates.values()), []
    for name, _, sides in found:
        for side in sides if OURS in sides else ():
            row = [name, side]
            for part in ("steps", "decode"):
                rate = part_of(sides, OURS, part)["flops"] / seconds(sides, side, part)
                row += [f"{rate / 1e9:.0f}", f"{rate / peak:.0%}"]
            rows.append(row)
    measured = ", ".join(f"{side} {rate / 1e9:.0f}" for side, rate in rates.items())
    yield "## Share of the peak of matrix products"
    yield PEAK_NOTE.format(matrix=case.matrix, measured=measured)
    head = ["case", "side", "steps, GFLOP/s", "of peak", "decode, GFLOP/s", "of peak"]
    yield table(head, rows, 2, wide=True)


# --- first stages --------------------------------------------------------------------------------


def first_stage_page(report: dict) -> str:
    """Training steps, encoding, training from latents; pieces of a step; memory and loads."""
    blocks, pieces, loads = [], [], []
    for kind, row in FIRST_STAGE_ROWS.items():
        if rows := [
            {"case": n, **row(sides, c.batch)} for n, c, sides in cases_of_kind(report, kind)
        ]:
            blocks += [FIRST_STAGE_NOTES[kind], table(rows[0], [list(r.values()) for r in rows])]
    for name, case in report["cases"].items():
        for side, entry in case.items():
            if cases.PIECES[0] in entry["parts"]:
                took = (seconds(case, side, piece) for piece in cases.PIECES)
                pieces.append([name, side, *cells(".3f", *took)])
            ran = processes(report, name, side)
            load = ", ".join("{:.1f} {:.1f}".format(*p["load"]) for p in ran)
            loads.append([name, side, f"{max(p['peak_gib'] for p in ran):.1f}", load])
    if pieces:
        note = "Seconds of parts of a step alone, forward and backward:"
        blocks += [note, table(["case", "side", *cases.PIECES], pieces)]
    head = ["case", "side", "peak memory GiB", "load before and after each process"]
    title = "# First stages: training step, encoding, latent cache"
    return page(title, *machines(report), *blocks, table(head, loads))


def step_row(case: dict, batch: int) -> dict[str, str]:
    del batch
    ours, theirs = seconds(case, OURS), seconds(case, TORCH)
    return {
        OURS: cell(".3f", ours),
        TORCH: cell(".3f", theirs),
        "ratio": cell(".2f", ours / theirs),
        "difference": difference(case),
        "compilation": cell(".0f", compiling(case, OURS)),
    }


def encode_row(case: dict, batch: int) -> dict[str, str]:
    ours, theirs = seconds(case, OURS), seconds(case, TORCH)
    fastest = [1 / run["least"] for run in part_of(case, OURS, "path").get("runs", ())]
    return {
        OURS: cell(".2f", batch / ours),
        TORCH: cell(".2f", batch / theirs),
        "ratio": cell(".2f", theirs / ours),
        "record to shard": cell(".2f", max(fastest, default=None)),
        "difference": difference(case),
        "compilation": cell(".0f", compiling(case, OURS)),
    }


def latent_row(case: dict, batch: int) -> dict[str, str]:
    plain, cached = seconds(case, IMAGES), seconds(case, CACHE)
    return {
        IMAGES: cell(".2f", batch / plain),
        CACHE: cell(".2f", batch / cached),
        "faster": cell(".2f", plain / cached),
        "seconds per step": cell(".3f", plain, cached),
        "difference": difference(case),
        "compilation": cell(".0f", compiling(case, IMAGES), compiling(case, CACHE)),
    }


FIRST_STAGE_ROWS = {
    cases.TrainStep: step_row,
    cases.Encode: encode_row,
    cases.LatentTraining: latent_row,
}
FINETUNE = (
    "A training step of all weights and of a LoRA: ldm_jax against diffusers and PEFT on torch"
)
PAGES = {
    "unet": unet_page,
    "finetune": functools.partial(unet_page, title=FINETUNE),
    "sampling": sampling_page,
    "first_stage": first_stage_page,
}
