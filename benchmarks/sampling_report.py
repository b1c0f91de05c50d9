"""The report of `sampling.py`: tables from the figures of all its processes."""

import statistics
from collections.abc import Iterable

import sampling_cases

# Name of a side: its script and its setting. The first is ours.
SIDES = {
    "ldm_jax": ("sampling_jax.py", "auto"),
    "torch": ("sampling_torch.py", "eager"),
    "torch.compile": ("sampling_torch.py", "compile"),
}
OURS, EAGER, COMPILED = SIDES
LONG = 50  # steps of the image that the last columns are for
TOLERANCE = 1e-3  # of the largest value; in float32
GOAL, ATTENTION_GOAL = 1.6, 3.0
NAMES = {"dense": "matmul", "norms": "norm"}


def agree(report: dict) -> bool:
    """Whether all sides drew the same images, as far as their type allows."""
    exact = report["machines"][-1]["dtype"] == "float32"
    found = [e["difference"] for case in report["cases"].values() for e in case.values()]
    return not exact or all(difference < TOLERANCE for difference in found)


def attention_of(platform: str, cases: Iterable[str]) -> tuple[str, ...]:
    """Cases whose attention is timed alone: of each width the smallest and the largest batch."""
    chosen: dict[int, list[str]] = {}
    for name in cases or sampling_cases.DEFAULT[platform]:
        chosen.setdefault(sampling_cases.CASES[name].model_channels, []).append(name)
    return tuple(dict.fromkeys(x for names in chosen.values() for x in (names[0], names[-1])))


def markdown(report: dict, platform: str) -> str:
    """The whole report."""
    machine = report["machines"][-1]
    skip = ("command", "date", "commit")
    about = ", ".join(f"{k} {v}" for k, v in machine.items() if k not in skip)
    when = "; ".join(f"`{m['command']}`, {m['date']}, {m['commit']}" for m in report["machines"])
    parts = [
        "# Sampling with Stable Diffusion v1: ldm_jax against diffusers on torch",
        f"{when}.",
        f"{about}.",
        *times(report, platform),
        *kinds(report),
        *operations(report, platform),
    ]
    return "\n\n".join(parts) + "\n"


# --- times ---------------------------------------------------------------------------------------


def times(report: dict, platform: str) -> list[str]:
    """Seconds per step and per image, memory, compilation; ratios to the faster torch."""
    rows, ratios = [], []
    for name, sides in report["cases"].items():
        case = sampling_cases.CASES[name]
        for side, entry in sides.items():
            step, decode = step_of(name, entry), median(entry["decode"])
            per_image = [(n * step + decode) / case.batch for n in (case.steps, LONG)]
            compilation = [entry.get("compile", {}).get(k) for k in ("steps", "decode")]
            cells = [f"{x:.3f}" for x in (step, decode, *per_image)]
            cells += ["" if x is None else f"{x:.0f}" for x in compilation]
            cells += [f"{max(entry['peak_gib']):.2f}", f"{entry['difference']:.0e}"]
            cells += [f"{max(max(pair) for pair in entry['load']):.1f}"]
            rows.append([name, side, *cells])
        ratios += ratio_rows(name, sides)
    device = "on the device" if platform == "gpu" else "resident"
    head = ["case", "side", "step, s", "decode, s", "image, s", f"image of {LONG} steps, s"]
    head += ["compile steps, s", "compile decoder, s", "peak, GiB", "difference", "load"]
    meant = "; ".join(f"{name}: {described(name)}" for name in report["cases"])
    return [
        "## Times",
        f"{meant}.",
        "Medians over processes of the median run. A step is of the whole batch; an image is all"
        f" steps of the case and the decoder, over the batch; for {LONG} steps it is"
        f" {LONG} times the step and the decoder where the case has fewer. Peak: largest {device}"
        " memory while sampling, weights included. Difference: largest from ldm_jax's image,"
        " relative to its largest value. Compilation is that of a first process, tracing included"
        " (torch: the first run less the median one). Load: the largest load average before or"
        " after a process; figures above the number of threads are of a busy machine.",
        table(head, rows, words=2),
        f"Over the faster torch (goal on CPU: at most {GOAL}):",
        table(["case", "step", "decode", "image", "faster torch, step"], ratios),
    ]


def described(name: str) -> str:
    """A case in words."""
    case = sampling_cases.CASES[name]
    pixels = 8 * case.size
    guided = f"guidance {sampling_cases.GUIDANCE}" if case.guided else "no guidance"
    return (
        f"UNet of {case.model_channels} and decoder of {case.decoder_channels} channels, batch"
        f" {case.batch}, {pixels}x{pixels} pixels, {case.steps} DDIM steps, {guided}"
    )


def step_of(name: str, entry: dict) -> float:
    """Seconds of one step of the batch."""
    return median(entry["steps"]) / sampling_cases.CASES[name].steps


def ratio_rows(name: str, sides: dict) -> list[list[str]]:
    """Ours over the faster of the others, for a step, the decoder and an image."""
    others = [side for side in sides if side != OURS]
    if OURS not in sides or not others:
        return []
    steps = sampling_cases.CASES[name].steps

    def seconds(side: str) -> tuple[float, float, float]:
        step, decode = step_of(name, sides[side]), median(sides[side]["decode"])
        return step, decode, steps * step + decode

    ours = seconds(OURS)
    best = [min(values) for values in zip(*map(seconds, others), strict=True)]
    faster = min(others, key=lambda side: seconds(side)[0])
    return [[name, *(f"{a / b:.2f}" for a, b in zip(ours, best, strict=True)), faster]]


# --- kinds of operation --------------------------------------------------------------------------


def kinds(report: dict) -> list[str]:
    """Where the time goes, of the steps and of the decoder."""
    rows = []
    for name, sides in report["cases"].items():
        for part in ("steps", "decode"):
            for side, entry in sides.items():
                if split := entry.get("split", {}).get(part):
                    scale = sampling_cases.CASES[name].steps if part == "steps" else 1
                    cells = [f"{split[kind] / scale:.3f}" for kind in sampling_cases.KINDS]
                    what = {"steps": "step", "decode": "decode"}[part]
                    rows.append([name, what, side, *cells])
    if not rows:
        return []
    head = ["case", "", "side", *(NAMES.get(kind, kind) for kind in sampling_cases.KINDS)]
    return [
        "## Seconds by kind of operation",
        "Of one further run under a profiler, which slows it down: read shares (how: README.md"
        " beside the script). torch.compile fuses what is elementwise, the norms' part too, into"
        " kernels that count as norm if they hold one.",
        table(head, rows, words=3),
    ]


# --- attention and products alone ----------------------------------------------------------------


def operations(report: dict, platform: str) -> list[str]:
    """Attention alone at the shapes of the cases, and the share of the peak of products."""
    found = report["operations"]
    parts = []
    if OURS in found and EAGER in found:
        rows = [
            [where, *attention_cells(found, where, "row"), *attention_cells(found, where, "one")]
            for where in found[OURS][-1]["attention"]
        ]
        parts += [
            "## Attention alone",
            f"Milliseconds (goal: at most {ATTENTION_GOAL:.0f} times torch's): of one of"
            f" {sampling_cases.IN_A_ROW} in a row, as in a network, and of a call of its own, which"
            " for ldm_jax is that of a compiled program. `text`: over the 77 tokens of a prompt.",
            table(
                ["case", OURS, EAGER, "ratio", f"{OURS}, a call", f"{EAGER}, a call", "ratio"],
                rows,
            ),
        ]
    if OURS in found:
        parts += share_of_peak(report, platform)
    return parts


def attention_cells(found: dict, where: str, name: str) -> list[str]:
    """Milliseconds of both sides and their ratio; `name`: "row" or "one"."""
    times = sampling_cases.IN_A_ROW if name == "row" else 1
    ours, theirs = (
        median([x["attention"][where][name]["runs"] for x in found[side]]) / times
        for side in (OURS, EAGER)
    )
    return [f"{1e3 * ours:.2f}", f"{1e3 * theirs:.2f}", f"{ours / theirs:.2f}"]


def share_of_peak(report: dict, platform: str) -> list[str]:
    """Operations per second of UNet and decoder over those of one large matrix product."""
    products = {
        side: max(x["product"]["flops"] / min(x["product"]["runs"]) for x in runs)
        for side, runs in report["operations"].items()
    }
    peak, rows = max(products.values()), []
    for name, sides in report["cases"].items():
        counted = sides.get(OURS, {}).get("flops")
        if counted is None:
            continue
        for side, entry in sides.items():
            rates = [counted[part] / median(entry[part]) for part in ("steps", "decode")]
            cells = [cell for rate in rates for cell in (f"{rate / 1e9:.0f}", f"{rate / peak:.0%}")]
            rows.append([name, side, *cells])
    side = sampling_cases.matrix_side(platform)
    measured = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in products.items())
    return [
        "## Share of the peak of matrix products",
        f"A product of {side}x{side} matrices in the type of the run: {measured} GFLOP/s."
        " Operations of the model are those of its convolutions and products, counted in our"
        " traced program.",
        table(["case", "side", "steps, GFLOP/s", "of peak", "decode, GFLOP/s", "of peak"], rows, 2),
    ]


# --- small parts ---------------------------------------------------------------------------------


def median(runs: list[list[float]]) -> float:
    """Over processes, of each one's median run."""
    return statistics.median(statistics.median(one) for one in runs)


def table(head: list[str], rows: list[list[str]], words: int = 1) -> str:
    """Markdown; the first `words` columns are set left, the others hold numbers."""
    marks = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, marks, *rows))
