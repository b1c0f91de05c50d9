"""Time of a program compiled for a TPU, estimated from its optimized HLO text without the TPU.

Every op counts, loop bodies as often as they run:
- ops with finite `estimated_cycles` of the compiler: those cycles over the clock;
- ops without (Pallas calls, sentinels near 2^63, plain copies): the larger of executed operations
  over the matrix peak and bytes over the memory's bandwidth, divided by EFFICIENCY;
- collectives: the bytes that a ring moves over one link in one direction, hidden by nothing; and
  between slices, which the compiler turns into transfers through the hosts, over their network.

Copies that run beside other ops (`copy-start` to `copy-done`) are counted apart, not in the sum.
"""

import collections
import dataclasses
import math
import re

from ldm_jax.cost import hlo

EFFICIENCY = 0.6
"""Share of the roofline that is assumed for ops the compiler has no estimate for."""
SENTINEL = 2**60
"""Estimates from this many cycles on are sentinels, not estimates."""
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
MEGASCALE = "_xla_megascale_transfer_type"
ASYNC_START = '"AsyncCollectiveStart"'
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
    """Bytes that the compiler lets a program have."""
    clock: float
    """Cycles per second."""
    link_bandwidth: float
    """Bytes per second of one link between chips, in one direction."""
    network_bandwidth: float
    """Bytes per second between slices, a chip's part of its host's network cards."""


CHIPS = {
    "v5e": Chip(197e12, 819e9, 15.75 * 2**30, 1.5e9, 45e9, 3.125e9),
    "v5p": Chip(459e12, 2765e9, 95.74 * 2**30, 1.75e9, 90e9, 6.25e9),
    "v6e": Chip(918e12, 1640e9, 31.25 * 2**30, 1.75e9, 90e9, 12.5e9),
}


@dataclasses.dataclass(frozen=True)
class Charge:
    """Cost of one op, all its runs together."""

    seconds: float
    source: str
    """"cycles", "kernels", "sentinels", "copies", "collectives" or "network"."""
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
class Transfer:
    """One collective."""

    kind: str
    """Opcode, as "all-gather"."""
    between: str
    """"chips" of a slice or "slices"."""
    runs: int
    group: int
    """Chips, or slices, that take part together."""
    arrays: tuple[hlo.Array, ...]
    """The larger side."""
    bytes: float
    """Bytes of these, per chip and run."""
    moved: float
    """Bytes that a ring sends from each chip in a run."""
    op: hlo.Op


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Time of one run of a program on one chip."""

    charges: list[Charge]
    transfers: list[Transfer]
    """Collectives, in the order of the program."""
    hidden_copies: float
    """Seconds of the asynchronous copies; in no sum."""
    unknown_loops: list[str]
    """Loops whose length the text does not say: counted once."""
    unknown_kernels: list[str]
    """Kernels that were charged for their bytes alone."""

    @property
    def collectives(self) -> dict[str, Traffic]:
        """Collectives between the chips of a slice, by kind."""
        return self._traffic("chips")

    @property
    def across_slices(self) -> dict[str, Traffic]:
        """Collectives between slices, by kind."""
        return self._traffic("slices")

    def _traffic(self, between: str) -> dict[str, Traffic]:
        by_kind: dict[str, Traffic] = {}
        for transfer in self.transfers:
            if transfer.between == between:
                traffic = by_kind.setdefault(transfer.kind, Traffic())
                traffic.count += transfer.runs
                traffic.bytes += transfer.runs * transfer.bytes
                traffic.moved += transfer.runs * transfer.moved
        return by_kind

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
    total = Estimate([], [], 0.0, [], [])
    module = hlo.parse(text)
    hidden = _walk(module, module.entry, 1, chip, kernels or {}, total)
    return dataclasses.replace(total, hidden_copies=hidden)


def _walk(module, name: str, runs: int, chip: Chip, kernels: dict, total: Estimate) -> float:
    """Charges every op of a computation; returns the seconds of hidden copies."""
    computation, hidden = module.computations[name], 0.0
    for op in computation.values():
        if op.opcode == "while":
            trips = hlo.trips(module, computation, op)
            if trips is None:
                total.unknown_loops.append(op.scope or op.name)
            for inner in (op.attribute("body"), op.attribute("condition")):
                hidden += _walk(module, inner, runs * (trips or 1), chip, kernels, total)
        elif op.opcode in ("call", "conditional", "async-start"):
            hidden += _walk_called(module, op, runs, chip, kernels, total)
        elif op.opcode in ("copy-start", "slice-start"):  # beside other ops: in no sum
            hidden += runs * _hbm_bytes(op.shape[:2]) / chip.memory_bandwidth
        elif op.opcode not in FREE and not op.opcode.endswith(hlo.DONE):
            _charge(module, computation, op, runs, chip, kernels, total)
    return hidden


def _walk_called(module, op, runs, chip, kernels, total) -> float:
    """A called computation, or the dearest branch of a conditional."""
    names = list(module.called(op))
    if op.opcode != "conditional":
        return sum(_walk(module, name, runs, chip, kernels, total) for name in names)
    listed = re.search(r"branch_computations=\{([^}]*)\}", op.attributes)
    pair = (op.attribute("true_computation"), op.attribute("false_computation"))
    names = re.findall(r"%([\w.\-]+)", listed.group(1)) if listed else [n for n in pair if n]
    branches = []
    for name in names:
        branch = Estimate([], [], 0.0, total.unknown_loops, total.unknown_kernels)
        branches.append((branch, _walk(module, name, runs, chip, kernels, branch)))
    dearest, hidden = max(branches, key=lambda pair: pair[0].seconds)
    total.charges.extend(dearest.charges)
    total.transfers.extend(dearest.transfers)
    return hidden


def _charge(module, computation, op, runs, chip, kernels, total) -> None:
    transfers = _transfers(module, computation, op, runs)
    for transfer in transfers:
        total.transfers.append(transfer)
        across = transfer.between == "slices"
        bandwidth = chip.network_bandwidth if across else chip.link_bandwidth
        source = "network" if across else "collectives"
        total.charges.append(Charge(runs * transfer.moved / bandwidth, source, runs, transfer.op))
    if op.opcode.removesuffix("-start") in (*COLLECTIVES, "send", "recv"):
        return
    cycles = re.search(r'"estimated_cycles":"?(\d+)', op.attributes)
    if cycles and int(cycles.group(1)) < SENTINEL:
        seconds, source = int(cycles.group(1)) / chip.clock, "cycles"
    else:
        operations = _operations(module, computation, op, kernels)
        if operations is None:
            total.unknown_kernels.append(op.scope or op.name)
        size = _hbm_bytes(op.shape) + sum(
            _hbm_bytes(computation[name].shape) for name in op.operands if name in computation
        )
        seconds = max((operations or 0) / chip.operations, size / chip.memory_bandwidth)
        seconds /= EFFICIENCY
        kernel = op.opcode == "custom-call" and "tpu_custom_call" in op.attributes
        source = "kernels" if kernel else "sentinels" if cycles else "copies"
    if seconds:
        total.charges.append(Charge(runs * seconds, source, runs, op))


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
    """Executed matrix operations of an op without an estimate; None for an unknown kernel."""
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


def _transfers(module, computation, op, runs: int) -> list[Transfer]:
    """The collectives that an op is or, as a fusion, holds."""
    if op.opcode == "send":
        return [_between_slices(op, runs)] if MEGASCALE in op.attributes else []
    kind = op.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        return [_between_chips(kind, op, computation, runs)]
    transfers = []
    for name in _fused(module, op):
        inner = module.computations[name]
        # an asynchronous collective occurs in every fusion from its start to its end
        starts = any(ASYNC_START in other.attributes for other in inner.values())
        for held in inner.values():
            if held.opcode not in COLLECTIVES or ("chain_id=" in held.attributes and not starts):
                continue
            # a fused all-reduce of which each chip keeps a part sends what a reduce-scatter does
            scatters = held.opcode == "all-reduce" and name.startswith("all-reduce-scatter")
            kind = "reduce-scatter" if scatters else held.opcode
            transfers.append(_between_chips(kind, held, inner, runs))
    return transfers


def _fused(module, op) -> list[str]:
    """Names of the computations of a fusion, of the fusions in it too."""
    if op.opcode != "fusion":
        return []
    names = list(module.called(op))
    inner = [held for name in names for held in module.computations[name].values()]
    return names + [name for held in inner for name in _fused(module, held)]


def _between_chips(kind: str, op: hlo.Op, computation: dict[str, hlo.Op], runs: int) -> Transfer:
    # The shape of an asynchronous start lists operands, results and scalar contexts.
    arrays = [a for a in op.shape if a.dtype not in ("u32", "s32") or a.dims]
    results = arrays[-len(op.operands) :] if op.opcode.endswith("-start") else arrays
    given = [
        array for name in op.operands if name in computation for array in computation[name].shape
    ]
    larger = max((results, given), key=lambda side: sum(a.bytes for a in side))
    size = sum(a.bytes for a in larger)
    if kind in ("collective-permute", "collective-broadcast"):
        return Transfer(kind, "chips", runs, 2, tuple(larger), size, size, op)
    # On a ring of n chips each sends (n - 1) / n of the whole array; an all-reduce does so twice,
    # as a reduce-scatter and an all-gather.
    n = group_size(op.attributes)
    moved = size * (n - 1) / n * (2 if kind == "all-reduce" else 1)
    return Transfer(kind, "chips", runs, n, tuple(larger), size, moved, op)


def _between_slices(op: hlo.Op, runs: int) -> Transfer:
    """A transfer through the hosts: each chip sends its part once in each direction of a ring."""
    stated = re.search(MEGASCALE + r'="(\w+)"', op.attributes).group(1)
    target = re.search(r'_xla_megascale_target="\{([\d,]*)\}', op.attributes)
    n = target.group(1).count(",") + 1 if target else 2
    kind = stated.lower().replace("_", "-")
    size = op.shape[0].bytes
    factor = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1.0}
    share = factor.get(kind, (n - 1) / n if kind in COLLECTIVES else 1.0)
    return Transfer(kind, "slices", runs, n, op.shape[:1], size, size * share, op)


def group_size(attributes: str) -> int:
    """Chips that take part in one collective together.

    Raises ValueError for groups written in an unknown way.
    """
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return listed.group(1).count(",") + 1
    iota = re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", attributes)
    if iota:
        return int(iota.group(1))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if mesh:  # between them device_ids may stand; 'x':(2)4 is a part of size 4 of the axis x
        sizes = dict(re.findall(r"'?([\w.]+)'?=(\d+)", mesh.group(1)))
        axes = re.findall(r"'?([A-Za-z_][\w.]*)'?(?::\(\d+\)(\d+))?", mesh.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    raise ValueError(f"a collective's groups are not understood: {attributes[:200]!r}")
