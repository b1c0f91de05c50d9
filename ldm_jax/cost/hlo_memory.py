"""The largest arrays that a compiled program holds at once, read from its HLO text.

The text is in the order of execution, so an array lives from the op that makes it to the last that
reads it. Arrays in on-chip memory, arguments, and results are not counted. An array that an op
updates in place counts once. The compiler packs arrays with disjoint lifetimes into one buffer;
`memory_analysis().temp_size_in_bytes` is its sum after packing.
"""

import dataclasses
import re

from ldm_jax.cost import hlo

SAME = ("bitcast", "while", "opt-barrier", "optimization-barrier", "conditional", "call")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array in the main memory."""

    array: hlo.Array
    op: hlo.Op

    @property
    def bytes(self) -> int:
        """With padding."""
        return self.array.bytes


def at_peak(module: hlo.Module) -> list[Buffer]:
    """The arrays alive when temporary arrays take the most bytes, the largest first."""
    buffers = _peak(module, module.entry)
    return sorted(buffers, key=lambda buffer: -buffer.bytes)


def _peak(module: hlo.Module, name: str) -> list[Buffer]:
    ops = list(module.computations[name].values())
    held = _holdings(module, ops)
    last = {}
    for i, op in enumerate(ops):
        for operand in op.operands:
            for buffer in held.get(operand, ()):
                last[id(buffer)] = i
    results = {id(b) for op in ops if op.root for b in held[op.name]}
    born: set[int] = set()
    live: dict[int, Buffer] = {}
    total, most, peak = 0, -1, []
    for i, op in enumerate(ops):
        for buffer in held[op.name]:
            if id(buffer) not in born:
                born.add(id(buffer))
                own = buffer.op is op and op.opcode != "parameter"
                if own and buffer.array.in_hbm and id(buffer) not in results:
                    live[id(buffer)] = buffer
                    total += buffer.bytes
        inner = _peak(module, op.attribute("body")) if op.opcode == "while" else []
        now = total + sum(buffer.bytes for buffer in inner)
        if now > most:
            most, peak = now, [*live.values(), *inner]
        for key in [key for key in live if last.get(key, i) <= i]:
            total -= live.pop(key).bytes
    return peak


def _holdings(module: hlo.Module, ops: list[hlo.Op]) -> dict[str, tuple[Buffer, ...]]:
    """The buffers of each op's result, an entry per array of its shape where that is known."""
    held: dict[str, tuple[Buffer, ...]] = {}
    for op in ops:
        given = [held.get(name, ()) for name in op.operands]
        every = tuple(buffer for buffers in given for buffer in buffers)
        if op.opcode == "get-tuple-element":
            index = int(op.attribute("index"))
            whole = given[0] if given else ()
            flat = len(op.shape) == 1 and index < len(whole)
            held[op.name] = (whole[index],) if flat else whole
        elif op.opcode == "tuple" or op.opcode in SAME:
            held[op.name] = every
        elif op.opcode.endswith(hlo.DONE):
            same = tuple(b for b in every if any(_equal(b.array, a) for a in op.shape))
            held[op.name] = same or every
        elif op.opcode == "dynamic-update-slice":
            held[op.name] = given[0]
        else:
            held[op.name] = _made(op, given)
    return held


def _made(op: hlo.Op, given: list[tuple[Buffer, ...]]) -> tuple[Buffer, ...]:
    """New buffers, except for results that alias an operand."""
    buffers = [Buffer(array, op) for array in op.shape]
    aliases = re.search(r"output_to_operand_aliasing=\{(.*?\}\)(?:, )?)+\}", op.attributes)
    for out, operand in re.findall(
        r"\{(\d*)\}: \((\d+), \{\}\)", aliases.group(0) if aliases else ""
    ):
        index = int(out or 0)
        if index < len(buffers) and int(operand) < len(given) and len(given[int(operand)]) == 1:
            buffers[index] = given[int(operand)][0]
    return tuple(buffers)


def _equal(a: hlo.Array, b: hlo.Array) -> bool:
    return a.dtype == b.dtype and a.dims == b.dims and a.in_hbm == b.in_hbm
