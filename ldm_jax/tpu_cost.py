"""Time of a program compiled for a TPU, estimated from its optimized HLO text without the TPU.

Every op counts, loop bodies as often as they run:
- what the compiler gives finite `estimated_cycles` for: those over the clock;
- what it does not (Pallas calls, sentinels near 2^63, plain copies): the larger of executed
  operations over the matrix peak and bytes over the memory's bandwidth, divided by EFFICIENCY;
- collectives: the bytes that a ring moves over one link in one direction, hidden by nothing.

Copies that run beside other ops (`copy-start` to `copy-done`) are counted apart, not in the sum.
"""

import collections
import dataclasses
import math
import re

from ldm_jax import hlo

EFFICIENCY = 0.6
"""Share of the roofline that is assumed for ops the compiler has no estimate for."""
SENTINEL = 2**60
"""Cycles from which on an estimate is none."""
LANES, SUBLANES = 128, 8
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "iota",
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one TPU chip."""

    operations: float
    """bfloat16 operations per second of the matrix units."""
    memory_bandwidth: float
    """Bytes per second."""
    memory: float
    """Bytes."""
    clock: float
    """Cycles per second."""
    link_bandwidth: float
    """Bytes per second of one link between chips, in one direction."""


CHIPS = {
    "v5e": Chip(197e12, 819e9, 16e9, 1.5e9, 45e9),
    "v5p": Chip(459e12, 2765e9, 95e9, 1.75e9, 90e9),
    "v6e": Chip(918e12, 1640e9, 32e9, 1.75e9, 90e9),
}


@dataclasses.dataclass(frozen=True)
class Charge:
    """What one op costs, all its runs together."""

    seconds: float
    source: str
    """"cycles", "kernels", "sentinels", "copies" or "collectives"."""
    runs: int
    op: hlo.Op


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind."""

    count: int = 0
    bytes: float = 0.0
    """Bytes of the arrays, per chip."""
    moved: float = 0.0
    """Bytes that a ring sends from each chip."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Time of one run of a program on one chip."""

    charges: list[Charge]
    collectives: dict[str, Traffic]
    hidden_copies: float
    """Seconds of the asynchronous copies; in no sum."""
    unknown_loops: list[str]
    """Loops whose length the text does not say: counted once."""
    unknown_kernels: list[str]
    """Kernels that were charged for their bytes alone."""

    @property
    def seconds(self) -> float:
        return sum(charge.seconds for charge in self.charges)

    def shares(self) -> dict[str, float]:
        """Share of the time that rests on each source."""
        seconds = collections.Counter()
        for charge in self.charges:
            seconds[charge.source] += charge.seconds
        return {source: n / self.seconds for source, n in seconds.most_common()}

    def utilization(self, operations: float, chip: Chip) -> float:
        """Model operations (`flops.count`, those of one chip) per second over the peak."""
        return operations / self.seconds / chip.operations


def estimate(text: str, chip: Chip, kernels: dict[str, dict] | None = None) -> Estimate:
    """The cost of the program whose `compiled.as_text()` is `text`.

    kernels: operations of Pallas kernels by name and shapes, as `flops.kernels` gives them for the
    traced program; a kernel that is not there counts with the cost its call states.
    Raises ValueError when `text` is no HLO.
    """
    found = Estimate([], {}, 0.0, [], [])
    module = hlo.parse(text)
    hidden = _walk(module, module.entry, 1, chip, kernels or {}, found)
    return dataclasses.replace(found, hidden_copies=hidden)


def _walk(module, name: str, runs: int, chip: Chip, kernels: dict, found: Estimate) -> float:
    """Charges every op of a computation; returns the seconds of hidden copies."""
    computation, hidden = module.computations[name], 0.0
    for op in computation.values():
        if op.opcode == "while":
            trips = hlo.trips(module, computation, op)
            if trips is None:
                found.unknown_loops.append(op.scope or op.name)
            for inner in (op.attribute("body"), op.attribute("condition")):
                hidden += _walk(module, inner, runs * (trips or 1), chip, kernels, found)
        elif op.opcode in ("call", "conditional", "async-start"):
            hidden += _walk_called(module, op, runs, chip, kernels, found)
        elif op.opcode in ("copy-start", "slice-start"):
            hidden += runs * _hbm_bytes(op.shape[:2]) / chip.memory_bandwidth
        elif op.opcode not in FREE and not op.opcode.endswith(hlo.DONE):
            _charge(module, computation, op, runs, chip, kernels, found)
    return hidden


def _walk_called(module, op, runs, chip, kernels, found) -> float:
    """A called computation, or the dearest branch of a conditional."""
    names = list(module.called(op))
    if op.opcode != "conditional":
        return sum(_walk(module, name, runs, chip, kernels, found) for name in names)
    listed = re.search(r"branch_computations=\{([^}]*)\}", op.attributes)
    pair = (op.attribute("true_computation"), op.attribute("false_computation"))
    names = re.findall(r"%([\w.\-]+)", listed.group(1)) if listed else [n for n in pair if n]
    branches = []
    for name in names:
        branch = Estimate([], {}, 0.0, found.unknown_loops, found.unknown_kernels)
        branches.append((branch, _walk(module, name, runs, chip, kernels, branch)))
    dearest, hidden = max(branches, key=lambda pair: pair[0].seconds)
    found.charges.extend(dearest.charges)
    for kind, traffic in dearest.collectives.items():
        _add(found.collectives, kind, traffic.count, traffic.bytes, traffic.moved)
    return hidden


def _charge(module, computation, op, runs, chip, kernels, found) -> None:
    kind = op.opcode.removesuffix("-start")
    inside = [inner for inner in _inside(module, op) if inner.opcode in COLLECTIVES]
    for inner in [op] if kind in COLLECTIVES else inside:
        kind = inner.opcode.removesuffix("-start")
        size, moved = _moved(kind, inner, computation if inner is op else {})
        _add(found.collectives, kind, runs, runs * size, runs * moved)
        seconds = runs * moved / chip.link_bandwidth
        found.charges.append(Charge(seconds, "collectives", runs, inner))
    if kind in COLLECTIVES and not inside:
        return
    cycles = re.search(r'"estimated_cycles":"?(\d+)', op.attributes)
    if cycles and int(cycles.group(1)) < SENTINEL:
        seconds, source = int(cycles.group(1)) / chip.clock, "cycles"
    else:
        operations = _operations(module, computation, op, kernels)
        if operations is None:
            found.unknown_kernels.append(op.scope or op.name)
        size = _hbm_bytes(op.shape) + sum(
            _hbm_bytes(computation[name].shape) for name in op.operands if name in computation
        )
        seconds = max((operations or 0) / chip.operations, size / chip.memory_bandwidth)
        seconds /= EFFICIENCY
        kernel = op.opcode == "custom-call" and "tpu_custom_call" in op.attributes
        source = "kernels" if kernel else "sentinels" if cycles else "copies"
    if seconds:
        found.charges.append(Charge(runs * seconds, source, runs, op))


def _inside(module, op) -> list[hlo.Op]:
    """Ops of a fusion, of the fusions in it too."""
    if op.opcode != "fusion":
        return []
    ops = [inner for name in module.called(op) for inner in module.computations[name].values()]
    return ops + [deep for inner in ops for deep in _inside(module, inner)]


def _hbm_bytes(arrays) -> int:
    return sum(array.bytes for array in arrays if array.in_hbm)


# --- operations ----------------------------------------------------------------------------------


def _operations(module, computation, op, kernels) -> float | None:
    """Executed matrix operations of an op without an estimate; None for a kernel nobody knows."""
    if op.opcode == "custom-call":
        given = [array for name in op.operands for array in computation[name].shape]
        shapes = tuple(array.dims for array in (*given, *op.shape))
        for name, calls in kernels.items():
            if shapes in calls and re.search(rf"\b{re.escape(name)}\b", op.scope):
                return calls[shapes]
        if "tpu_custom_call" not in op.attributes:
            return 0.0
        stated = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', op.attributes)
        return float(stated.group(1)) if stated else None
    total = 0.0
    for inner in _inside(module, op) or [op]:
        if inner.opcode == "convolution":
            total += _convolution(module, inner)
    return total


def _convolution(module, op) -> float:
    """2 x output x kernel, features in whole lanes and output pixels in whole sublanes."""
    owner = next(ops for ops in module.computations.values() if ops.get(op.name) is op)
    labels = re.search(r"dim_labels=\w+_(\w+)->(\w+)", op.attributes)
    kernel, output = owner[op.operands[1]].shape[0].dims, op.shape[0].dims
    features_in = kernel[labels.group(1).index("i")]
    features_out = kernel[labels.group(1).index("o")]
    taps = math.prod(kernel) // features_in // features_out
    columns = output[labels.group(2).index("f")]
    pixels = math.prod(output) // columns
    tiles = _up(pixels, SUBLANES) * _up(columns, LANES) * _up(features_in, LANES)
    return 2.0 * tiles * taps


def _up(n: int, size: int) -> int:
    return -(-n // size) * size


# --- collectives ---------------------------------------------------------------------------------


def _add(collectives: dict[str, Traffic], kind: str, count: int, size: float, moved: float) -> None:
    traffic = collectives.setdefault(kind, Traffic())
    traffic.count += count
    traffic.bytes += size
    traffic.moved += moved


def _moved(kind: str, op: hlo.Op, computation: dict[str, hlo.Op]) -> tuple[float, float]:
    """(bytes of the larger side, bytes that a ring sends from each chip)."""
    results = op.shape[-1:] if op.opcode.endswith("-start") else op.shape
    results = [array for array in results if array.dtype not in ("u32", "s32") or array.dims]
    given = [
        array for name in op.operands if name in computation for array in computation[name].shape
    ]
    size = max(sum(a.bytes for a in results), sum(a.bytes for a in given))
    if kind in ("collective-permute", "collective-broadcast"):
        return size, size
    n = _group_size(op.attributes)
    return size, size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _group_size(attributes: str) -> int:
    """Chips that take part in one collective together.

    Raises ValueError for groups written in an unknown way.
    """
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return listed.group(1).count(",") + 1
    iota = re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", attributes)
    if iota:
        return int(iota.group(1))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if mesh:
        sizes = dict(re.findall(r"'?([\w.]+)'?=(\d+)", mesh.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"[\w.]+", mesh.group(2)))
    raise ValueError(f"a collective's groups are not understood: {attributes[:200]!r}")
