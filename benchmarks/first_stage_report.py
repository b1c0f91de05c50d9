"""The tables of `first_stage.py`."""

import statistics

import first_stage_cases as cases

TOLERANCE = 1e-3
HEADS = {
    "step": "Seconds of a training step of generator and discriminator (first stage with LPIPS on"
    " VGG16, PatchGAN of 3 layers, two Adams); ratio: ldm_jax over torch, below 1 is faster here.",
    "encode": "Images encoded per second: the encoder alone, and `ldm-train encode` from record to"
    " shard. Ratio: ldm_jax over torch, above 1 is faster here.",
    "train": "Training images per second of the latent diffusion recipe: encoding the images of"
    " every batch, and reading latents that were encoded once.",
}


def difference(expected: list[list[float]], found: list[list[float]]) -> float:
    """Largest difference of two lists of losses, relative to each or to 1 if it is smaller."""
    pairs = [pair for rows in zip(expected, found, strict=True) for pair in zip(*rows, strict=True)]
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs)


def agrees(case: dict) -> bool:
    """Whether all processes of a case gave the same losses (`TERMS`; of encoders: moments)."""
    return all(entry["difference"] < TOLERANCE for entry in sides_of(case).values())


def sides_of(case: dict) -> dict[str, dict]:
    """{side: its figures}."""
    return {name: entry for name, entry in case.items() if name != "losses"}


def seconds(entry: dict) -> float:
    """The median over processes of the median run."""
    return statistics.median(statistics.median(runs) for runs in entry["runs"])


def markdown(report: dict) -> str:
    """All tables."""
    lines = ["# First stages: training step, encoding, latent cache", ""]
    for machine in report["machines"]:
        about = ", ".join(f"{k} {v}" for k, v in machine.items() if k != "command")
        lines += [f"`{machine['command']}`", "", f"{about}.", ""]
    for kind, row in (("step", step_row), ("encode", encode_row), ("train", train_row)):
        found = {n: c for n, c in report["cases"].items() if cases.CASES[n].kind == kind}
        if found:
            rows = [row(name, case) for name, case in found.items()]
            lines += [HEADS[kind], "", *table(rows), ""]
    pieces = [
        {"case": n, "side": side, **{p: f"{x:.3f}" for p, x in entry["pieces"].items()}}
        for n, case in report["cases"].items()
        for side, entry in sides_of(case).items()
        if "pieces" in entry
    ]
    if pieces:
        lines += ["Seconds of parts of a step alone, forward and backward:", "", *table(pieces), ""]
    loads = [
        {
            "case": n,
            "side": side,
            "peak memory GiB": f"{max(entry['peak_gib']):.1f}",
            "load before and after each process": ", ".join(
                f"{a:.1f} {b:.1f}" for a, b in entry["load"]
            ),
        }
        for n, case in report["cases"].items()
        for side, entry in sides_of(case).items()
    ]
    return "\n".join([*lines, *table(loads)]) + "\n"


def step_row(name: str, case: dict) -> dict[str, str]:
    ours, theirs = case[cases.OURS], case[cases.TORCH]
    return {
        "case": name,
        cases.OURS: f"{seconds(ours):.3f}",
        cases.TORCH: f"{seconds(theirs):.3f}",
        "ratio": f"{seconds(ours) / seconds(theirs):.2f}",
        "difference": f"{max(e['difference'] for e in (ours, theirs)):.0e}",
        "compilation": f"{ours['compile']:.0f}",
    }


def encode_row(name: str, case: dict) -> dict[str, str]:
    ours, theirs = case[cases.OURS], case[cases.TORCH]
    batch = cases.CASES[name].batch
    return {
        "case": name,
        cases.OURS: f"{batch / seconds(ours):.2f}",
        cases.TORCH: f"{batch / seconds(theirs):.2f}",
        "ratio": f"{seconds(theirs) / seconds(ours):.2f}",
        "record to shard": f"{ours['path_per_second']:.2f}",
        "difference": f"{max(e['difference'] for e in (ours, theirs)):.0e}",
        "compilation": f"{ours['compile']:.0f}",
    }


def train_row(name: str, case: dict) -> dict[str, str]:
    cached, plain = case[cases.CACHE], case[cases.IMAGES]
    batch = cases.CASES[name].batch
    return {
        "case": name,
        cases.IMAGES: f"{batch / seconds(plain):.2f}",
        cases.CACHE: f"{batch / seconds(cached):.2f}",
        "faster": f"{seconds(plain) / seconds(cached):.2f}",
        "seconds per step": f"{seconds(plain):.3f}, {seconds(cached):.3f}",
        "difference": f"{max(e['difference'] for e in (cached, plain)):.0e}",
        "compilation": f"{plain['compile']:.0f}, {cached['compile']:.0f}",
    }


def table(rows: list[dict[str, str]]) -> list[str]:
    """Lines of a Markdown table; all rows have the keys of the first."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    return lines + ["| " + " | ".join(row[n] for n in names) + " |" for row in rows]
