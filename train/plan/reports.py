"""Report of a compiled program's cost, with advice where it does not fit."""

import math
from collections import Counter
from typing import Any, NamedTuple

from ldm_jax import schema
from ldm_jax.cost import hlo, hlo_memory, tpu_cost
from ldm_jax.train.plan.programs import Target

SOURCES = ("cycles", "kernels", "sentinels", "copies", "collectives", "network")
SMALL = 2**20
"""Bytes up to which a collective counts as small: metrics and norms."""


class Result(NamedTuple):
    """Facts of a program; without a text it was not compiled."""

    about: dict[str, Any]
    """`traced.json`, `compiled.json` and `failed.json` in one."""
    text: str | None


def needed(about: dict) -> float:
    """Bytes of a device that the program takes: results in the place of donated arguments once."""
    return about["argument"] + about["output"] - about["alias"] + about["temp"]


def unread(about: dict) -> float:
    """Bytes on the device that the program does not read, as a first stage beside cached
    latents."""
    return max(0, sum(about["resident"].values()) - about["argument"])


def fits(target: Target, about: dict) -> bool:
    """True if it was compiled into the memory of a chip, with all that is resident there."""
    if "failed" in about or "temp" not in about:
        return False
    chip = target.topology.chip
    return chip is None or needed(about) + unread(about) <= chip.memory


def kernels_of(about: dict) -> dict[str, dict]:
    """Operations of the kernels in `traced.json`, as `tpu_cost.estimate` takes them."""
    kernels: dict[str, dict] = {}
    for name, shapes, operations in about["kernels"]:
        kernels.setdefault(name, {})[tuple(map(tuple, shapes))] = operations
    return kernels


def estimate(target: Target, result: Result) -> tpu_cost.Estimate:
    """Time and collectives; for a GPU only the collectives are meaningful."""
    chip = target.topology.chip or tpu_cost.CHIPS["v5e"]
    return tpu_cost.estimate(result.text, chip, kernels_of(result.about))


def render(target: Target, result: Result) -> str:
    """The whole report."""
    about, topology = result.about, target.topology
    lines = [f"{title(target)}; mesh {_mesh(about)}"]
    if topology.kind == "gpu":
        lines.append(
            "NOT A GPU COMPILE: fake CPU devices. Bytes and collectives are those of XLA's"
            " partitioning; its GPU compiler fuses and schedules otherwise. No time."
        )
    if "failed" in about:
        return "\n".join([*lines, *failure(target, about)]) + "\n"
    cost = estimate(target, result)
    lines += [*memory_lines(target, about), *time_lines(target, about, cost)]
    lines += [*collective_lines(about, cost), *buffer_lines(result.text)]
    lines += advice(target, about)
    return "\n".join(lines) + "\n"


def title(target: Target) -> str:
    """The target in one line."""
    config, n = target.config, target.topology.num_devices
    what = "sampling" if target.sample else "training step"
    if target.sample:
        size = f"{target.images} images of {target.width}x{target.height}"
        size += f", {target.space} devices an image" if target.space > 1 else ""
        size += f", {config.sample_steps} steps"
    else:
        size = f"batch {config.batch_size}, {config.data.size}x{config.data.size}"
        size += " from cached latents" if target.cached else ""
        size += f", accumulate {config.accumulate}" if config.accumulate > 1 else ""
        size += ", remat" if config.remat else ""
    return f"{what} on {target.topology} ({n} devices): {size}, {config.dtype}"


def _mesh(about: dict) -> str:
    return " x ".join(f"{axis} {n}" for axis, n in about.get("mesh", {}).items())


def gb(size: float) -> str:
    """Bytes in GB, small numbers in MB, as text."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def memory_lines(target: Target, about: dict) -> list[str]:
    """HBM of a device against its capacity."""
    parts = ", ".join(f"{name} {gb(size)}" for name, size in about["resident"].items() if size)
    lines = ["", f"memory of a device: {gb(needed(about))}"]
    chip = target.topology.chip
    if chip is not None:
        share = (needed(about) + unread(about)) / chip.memory
        verdict = "fits" if fits(target, about) else "DOES NOT FIT"
        lines[-1] += f" of {gb(chip.memory)} ({100 * share:.0f} %): {verdict}"
    lines += [
        f"  arguments {gb(about['argument'])} ({parts})",
        f"  results {gb(about['output'])}, of these in the place of arguments {gb(about['alias'])}",
        f"  temporary {gb(about['temp'])}",
    ]
    if about["peak"]:
        lines.append(f"  most at a time, by the compiler's own count: {gb(about['peak'])}")
    if unread(about) > SMALL:
        lines.append(f"  besides, held but not read by this program: {gb(unread(about))}")
    return lines


def time_lines(target: Target, about: dict, cost: tpu_cost.Estimate) -> list[str]:
    """FLOPs, time and utilization."""
    lines = ["", f"operations of the model: {about['operations'] / 1e12:.4g} TFLOP per device"]
    chip = target.topology.chip
    if chip is None:
        return lines
    shares = cost.shares()
    sources = ", ".join(f"{name} {100 * shares[name]:.1f} %" for name in SOURCES if name in shares)
    mfu = 100 * cost.utilization(about["operations"], chip)
    what = "call" if target.sample else "step"
    lines += [
        f"time of a {what}: {1e3 * cost.seconds:.0f} ms, MFU {mfu:.1f} % (estimated)",
        f"  by source: {sources}; copies beside other work: {1e3 * cost.hidden_copies:.0f} ms",
    ]
    if target.sample:
        lines.append(f"  {cost.seconds / target.images:.3f} s an image on the whole slice")
    else:
        rate = target.config.batch_size / cost.seconds
        lines.append(f"  {rate:.0f} images/s, {rate / target.topology.num_devices:.2f} per chip")
    for what, names in (
        ("loops of unknown length, counted once", cost.unknown_loops),
        ("kernels charged for their bytes alone", cost.unknown_kernels),
    ):
        if names:
            lines.append(f"  {what}: {', '.join(sorted(set(names))[:5])}")
    return lines


# --- collectives ----------------------------------------------------------------------------------


def kind_of(transfer: tpu_cost.Transfer, about: dict) -> str:
    """Kind of a collective by size: "parameters" (or their gradients), "small" or "activations".

    An array of the size of a parameter, or of its part on a device, counts as one.
    """
    sizes = {math.prod(dims) for pair in about["parameters"] for dims in pair}
    known = [math.prod(array.dims) in sizes for array in transfer.arrays]
    if transfer.bytes <= SMALL:
        return "small"
    return "parameters" if all(known) else "activations"


def collective_lines(about: dict, cost: tpu_cost.Estimate) -> list[str]:
    """By kind and network; and those that move activations."""
    lines = ["", "collectives of a device:"]
    for where, traffic in (
        ("in a slice", cost.collectives),
        ("between slices", cost.across_slices),
    ):
        for kind, t in sorted(traffic.items(), key=lambda item: -item[1].moved):
            lines.append(
                f"  {kind} {where}: {t.count} times, arrays {gb(t.bytes)}, sent {gb(t.moved)}"
            )
    if not cost.transfers:
        lines.append("  none")
    moving = [t for t in cost.transfers if kind_of(t, about) == "activations"]
    if moving:
        total = sum(t.runs * t.moved for t in moving)
        lines.append(f"  of these not of a parameter's size: {len(moving)}, sent {gb(total)}")
        for t in sorted(moving, key=lambda t: -t.runs * t.moved)[:5]:
            shapes = ", ".join(f"{a.dtype}{list(a.dims)}" for a in t.arrays[:2])
            lines.append(f"    {t.kind} {shapes} x {t.runs}: {t.op.scope or t.op.name}")
    return lines


# --- buffers --------------------------------------------------------------------------------------


def buffer_lines(text: str, count: int = 8) -> list[str]:
    """The largest temporary arrays that live at once."""
    buffers = hlo_memory.at_peak(hlo.parse(text))
    total = sum(buffer.bytes for buffer in buffers)
    lines = ["", f"largest temporary arrays (of {len(buffers)} at once, {gb(total)}):"]
    for (label, size), n in _grouped(buffers)[:count]:
        lines.append(f"  {n} x {gb(size)} {label}")
    return lines


def _grouped(buffers: list[hlo_memory.Buffer]) -> list[tuple[tuple[str, int], int]]:
    counts: Counter = Counter()
    for buffer in buffers:
        scope = "/".join(buffer.op.scope.split("/")[-3:]) or buffer.op.opcode
        label = f"{buffer.array.dtype}{list(buffer.array.dims)} {scope}"
        counts[label, buffer.bytes] += 1
    return sorted(counts.items(), key=lambda item: -item[0][1] * item[1])


# --- what to change -------------------------------------------------------------------------------


def failure(target: Target, about: dict) -> list[str]:
    """Lines on the compiler's failure, its likely cause, and the remedy."""
    failed = about["failed"]
    lines = ["", f"not compiled: {failed['how']}"]
    logits = about.get("largest_logits")
    if failed["kind"] == "memory":
        lines.append("  it would not fit on the hardware either: this is the compiler's own count")
    elif failed["kind"] == "killed":
        lines.append(
            "  SIGKILL is what the kernel sends when memory runs out: compiling takes 5 to 20 GB"
            " and more; end other programs, or compile where there is more memory"
        )
    elif failed["kind"] == "crashed":
        lines.append("  libtpu is known to crash on large attention logits")
    if logits and failed["kind"] in ("crashed", "killed"):
        where = "on one device" if logits["local"] else "over all devices"
        lines.append(
            f"  largest logits: {logits['shape']}, {gb(logits['bytes'])} {where}; --attention auto"
            " takes the fused kernel, which has none; else fewer images per device"
        )
    if "log" in failed:
        lines.append(f"  the compiler's own words are in {failed['log']}")
    return lines + advice(target, about)


def advice(target: Target, about: dict) -> list[str]:
    """Lines with changes that should make it fit, by rule: none of them was compiled."""
    chip = target.topology.chip
    memory = about.get("failed", {}).get("kind") == "memory"
    if chip is None or "resident" not in about or fits(target, about):
        return []
    if "failed" in about and not memory:
        return []
    suggestions = [f"  {text}" for _, text in changes(target, about) if text] or [
        "  fewer images per device, or a larger slice"
    ]
    return ["", "changes that should make it fit (by rule; --search compiles them):", *suggestions]


def changes(target: Target, about: dict) -> list[tuple[dict, str]]:
    """[(fields of the config, flags and reason)], the cheapest first."""
    config, chip = target.config, target.topology.chip
    resident, advised = sum(about["resident"].values()), []
    mesh = about["mesh"]
    each = target.topology.num_devices // target.topology.slices
    if about["whole"] and resident > chip.memory / 3 and mesh.get("fsdp", 1) < each:
        wider = schema.MeshConfig(data=1, fsdp=-1, dcn_data=-1)
        reason = f"{gb(resident)} lie there; split over {each} chips {gb(about['whole'] / each)}"
        advised.append(({"mesh": wider}, f"--mesh.data 1 --mesh.fsdp -1: {reason}"))
    if target.sample:
        return advised
    if not config.remat:
        advised.append(
            ({"remat": True}, "--remat: keeps the inputs of blocks, and recomputes the rest")
        )
    examples = config.batch_size // (mesh["data"] * mesh["fsdp"])
    accumulate = config.accumulate * 2
    while examples % accumulate == 0 and accumulate <= examples:
        reason = f"{examples // accumulate} images per device at a time"
        advised.append(({"remat": True, "accumulate": accumulate}, _flags(accumulate, reason)))
        accumulate *= 2
    return advised


def _flags(accumulate: int, reason: str) -> str:
    return f"--remat --accumulate {accumulate}: {reason}"
