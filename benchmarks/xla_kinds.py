"""Seconds of a compiled program by kind of operation, from a trace of XLA's profiler."""

import bisect
import collections
import heapq
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import cases
import jax

from ldm_jax.cost import hlo

PROJECTIONS = (
    r"/(to_q|to_k|to_v|to_out_0|proj|query|key|value|proj_attn)/"
    r"|/(net_2|linear_1|linear_2|time_emb_proj)/"
)
CONVOLUTIONS = r"conv_general_dilated|/(conv\d?|conv_in|conv_out|conv_shortcut)/"
NORMS = r"/(norm\d?|group_norm|conv_norm_out)/"
CONTAINERS = ("while", "call", "conditional")  # their parts are traced themselves
COPIES = ("copy", "transpose", "concatenate", "slice", "pad", "broadcast", "bitcast")
Interval = tuple[float, float, str]
"""(start, end, HLO operation) in ns."""


def split(run: Callable[[], object], program: jax.stages.Compiled) -> dict[str, float]:
    """Seconds by kind of operation of one run of the program.

    An instant counts in equal parts for the operations that run then, on any thread. "rest" are
    the instants with none.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        intervals = traced(jax.profiler.ProfileData.from_file(str(path)))
    module = hlo.parse(program.as_text())
    kinds = {
        name: kind_of(inside(module, op))
        for computation in module.computations.values()
        for name, op in computation.items()
    }
    total = dict.fromkeys(cases.KINDS, 0.0)
    for operation, value in shares(until_read(intervals, module)).items():
        total[kinds.get(operation, "elementwise") if operation else "rest"] += value
    return total


def traced(data: jax.profiler.ProfileData) -> list[Interval]:
    """The operations of a trace; one that works on other threads ends with "end: ..."."""
    starts, ends = [], {}
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    starts.append((event, stats["hlo_op"], stats.get("_p")))
                elif event.name.startswith("end: "):
                    ends[stats.get("_c")] = event.start_ns
    return [
        (e.start_ns, max(e.start_ns + e.duration_ns, ends.get(p, 0)), op) for e, op, p in starts
    ]


def until_read(intervals: list[Interval], module: hlo.Module) -> list[Interval]:
    """The intervals, each over at the latest when an operation starts that reads its result.

    On CPUs an operation in several parts starts the next ones from within the last part, so that
    in the trace they lie in it.
    """
    readers = readers_of(module, {operation for _, _, operation in intervals})
    starts = collections.defaultdict(list)
    for start, _, operation in sorted(intervals):
        starts[operation].append(start)

    def over(start: float, end: float, operation: str) -> float:
        for reader in readers[operation]:
            later = starts[reader][bisect.bisect_right(starts[reader], start) :][:1]
            end = min([end, *later])
        return end

    return [(start, over(start, end, operation), operation) for start, end, operation in intervals]


def readers_of(module: hlo.Module, traced: set[str]) -> dict[str, set[str]]:
    """{operation: those of `traced` that read its result}, also through operations without a trace,
    as tuples and bitcasts are."""
    direct = collections.defaultdict(set)
    for computation in module.computations.values():
        for name, op in computation.items():
            for operand in op.operands:
                direct[operand].add(name)

    def reached(operation: str) -> set[str]:
        seen, todo = set(), list(direct[operation])
        while todo:
            reader = todo.pop()
            if reader not in seen:
                seen.add(reader)
                todo += [] if reader in traced else direct[reader]
        return seen & traced

    return {operation: reached(operation) for operation in traced}


def shares(intervals: list[Interval]) -> dict[str | None, float]:
    """Seconds of each operation, and None: of none, between the first start and the last end."""
    intervals = sorted(intervals)
    seconds = collections.defaultdict(float)
    running: list[tuple[float, str]] = []
    now = intervals[0][0]

    def advance(until: float):
        nonlocal now
        while now < until:
            stop = min(until, running[0][0]) if running else until
            for _, operation in running or [(0, None)]:
                seconds[operation] += (stop - now) / max(1, len(running)) / 1e9
            now = stop
            while running and running[0][0] <= now:
                heapq.heappop(running)

    for start, end, operation in intervals:
        advance(start)
        if not operation.startswith(CONTAINERS):
            heapq.heappush(running, (end, operation))
    while running:
        advance(running[0][0])
    return seconds


def inside(module: hlo.Module, op: hlo.Op) -> list[hlo.Op]:
    """The operation, then all that it computes if it is a fusion."""
    fused = module.computations.get(op.attribute("calls"), {})
    return [op, *(part for inner in fused.values() for part in inside(module, inner))]


def kind_of(ops: list[hlo.Op]) -> str:
    """Kind of a fusion: by the convolution or matrix product in it, else by its origin."""
    for op in ops:
        if op.opcode in ("convolution", "dot", "custom-call"):
            if re.search(CONVOLUTIONS, op.scope):
                return "convolution"
            return "dense" if re.search(PROJECTIONS, op.scope) else "attention"
    source = next((op.scope for op in ops if op.scope), "")
    if "UNet" not in source and "Autoencoder" not in source:
        return cases.OUTSIDE if source else "copies"
    if ops[0].opcode in COPIES:
        return "copies"
    if re.search(NORMS, source):
        return "norms"
    own = r"/attn\d/" if "UNet" in source else r"/attentions_\d/"
    if re.search(own, source) and not re.search(PROJECTIONS, source):
        return "attention"
    return "elementwise"
