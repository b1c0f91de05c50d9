"""The fault table as Markdown."""

import faults_cases
import faults_input
from faults_cluster import DELAY, EVERY, TIMEOUT


def markdown(report: dict) -> str:
    """The table, what was said, and how it was made."""
    machine, cases = report["machine"], report["cases"]
    passed = sum(case["passed"] for case in cases.values())
    lines = [
        "# Faults",
        "",
        f"{passed} of {len(cases)} cases passed: nothing of them hung, nothing was lost beyond"
        " the last checkpoint, and the last state",
        "(parameters, averages, optimizer, counters) and every loss have the bits of the run that"
        " was left alone.",
        "",
        "    python benchmarks/faults.py --out benchmarks/results",
        "",
        f"Two hosts of two CPU devices, a checkpoint every {faults_input.SAVE} steps; a sign of"
        f" life every {EVERY} s, lost after {TIMEOUT:.0f} s without, first restart after"
        f" {DELAY:.0f} s.",
        f"{machine['cores']} CPUs, load average {machine['load']:.0f}, Python {machine['python']},"
        f" JAX {machine['jax']}.",
        "",
        "| fault | others left after, s | every host stepping again after, s | steps made again |"
        " last state | passed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [row(case) for case in cases.values()]
    left = [
        case[0]
        for run in faults_cases.RUNS.values()
        for name, case in run.cases.items()
        if name not in cases
    ]
    lines += [""] + [f"- {note}" for note in report.get("notes", [])]
    lines += [f"- Not run yet: {'; '.join(left)}."] if left else []
    lines += ["", "## What was said", ""]
    for case in cases.values():
        said = case.get("said", [])[:3]
        lines += [f"- {case['what']}{notes(case)}", *(f"  - `{line[:300]}`" for line in said)]
    return "\n".join(lines) + "\n"


def row(case: dict) -> str:
    """One line of the table."""

    def seconds(name: str) -> str:
        return f"{case[name]:.1f}" if name in case else "-"

    if "differs" not in case:
        state = "not reached"
    else:
        state = "equal" if not case["differs"] else f"differs: {', '.join(case['differs'][:3])}"
    again = case.get("steps again", [])
    steps = (
        ", ".join(map(str, again))
        if len(again) < 8
        else f"{len(again)} times, {max(again)} at most"
    )
    cells = (
        case["what"],
        seconds("detected"),
        seconds("working again"),
        steps or "-",
        state,
        "yes" if case["passed"] else "**no**",
    )
    return f"| {' | '.join(cells)} |"


def notes(case: dict) -> str:
    """Figures that only some cases have."""
    names = {
        "codes of the stop": "exit codes",
        "code of the other": "exit code of the other",
        "codes of the refusal": "exit codes of the refusal",
        "saving again": "saving again after, s",
        "saved at": "saved at step",
        "kept": "kept the checkpoint of step",
        "half-written": "left",
        "file": "file",
        "kills": "kills",
    }
    found = [f"{label} {plain(case[name])}" for name, label in names.items() if name in case]
    return f" ({'; '.join(found)})" if found else ""


def plain(value: object) -> str:
    """A number with one digit, a list without brackets."""
    if isinstance(value, float):
        return f"{value:.1f}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
