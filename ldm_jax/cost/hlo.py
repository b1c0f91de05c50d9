"""Optimized HLO text of a TPU program, read into computations, ops, shapes and loop trips.

Only what `tpu_cost` needs. The text is that of `compiled.as_text()`.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0}  # the others carry their bits in the name
HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\) -> .*\{$")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
DONE = ("-done", "-update")  # the end of an asynchronous op whose start is charged


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: its type, sizes and layout."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def in_hbm(self) -> bool:
        """True if it lies in the main memory (HBM), False if in on-chip memory."""
        return not re.search(r"S\([1-9]", self.layout)

    @property
    def bytes(self) -> int:
        """Bytes it takes with the padding of its layout's tiles."""
        order = re.match(r"[\d,]+", self.layout)
        minor_first = [int(i) for i in order.group().split(",")] if order else []
        dims = [self.dims[i] for i in minor_first] if minor_first else list(self.dims[::-1])
        tile = re.search(r"T\(([\d,]+)\)", self.layout)
        if tile:
            for i, size in enumerate(int(n) for n in tile.group(1).split(",")[::-1]):
                if i < len(dims):
                    dims[i] = -(-dims[i] // size) * size
        bits = re.search(r"\d+", self.dtype)
        item = BYTES[self.dtype] if self.dtype in BYTES else int(bits.group()) / 8 if bits else 0
        return math.ceil(math.prod(dims) * item)


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction of a computation."""

    name: str
    opcode: str
    shape: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    """Text between the parentheses, as written: the value of a constant."""
    attributes: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """The word after `name=`."""
        match = re.search(rf"[,\s]{name}=%?([^\s,}}]+)", self.attributes)
        return match.group(1) if match else None

    @property
    def scope(self) -> str:
        """Origin in the traced program: the path of `jit`, module and primitive names."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match.group(1) if match else ""


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: computations by name, each a dict of its ops in their order."""

    computations: dict[str, dict[str, Op]]
    entry: str

    def called(self, op: Op) -> Iterator[str]:
        """Names of the computations that an op runs."""
        for key in ("calls", "to_apply", "body", "condition"):
            name = op.attribute(key)
            if name in self.computations:
                yield name


def parse(text: str) -> Module:
    """The module that the text of one compiled program describes.

    Raises ValueError when the text has no entry computation.
    """
    computations: dict[str, dict[str, Op]] = {}
    entry, ops = None, None
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            ops = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            ops = None
        elif ops is not None and " = " in line:
            op = _op(line.strip())
            ops[op.name] = op
    if entry is None:
        raise ValueError("this is no HLO text: it has no ENTRY; take compiled.as_text()")
    return Module(computations, entry)


def _op(line: str) -> Op:
    name, rest = line.split(" = ", 1)
    root, name = name.startswith("ROOT "), name.removeprefix("ROOT ").lstrip("%")
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, rest = rest.split("(", 1)
    end = _closing("(" + rest) - 1
    arguments, attributes = rest[: end - 1], rest[end:]
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), layout or "")
        for dtype, dims, layout in ARRAY.findall(shape)
    )
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Op(name, opcode, arrays, operands, arguments, attributes, root)


def _closing(text: str) -> int:
    """The position after the parenthesis that closes the first one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"HLO line without its closing parenthesis: {text[:80]!r}")


def root(computation: dict[str, Op]) -> Op:
    return next(op for op in computation.values() if op.root)


# --- loops ---------------------------------------------------------------------------------------


def trips(module: Module, computation: dict[str, Op], loop: Op) -> int | None:
    """Number of times that the body of a `while` runs; None where the text does not say it.

    Read from `known_trip_count`, or from a counter that starts at a constant and is compared with
    one, as every `scan`, `map` and `fori_loop` of fixed length has it.
    """
    known = re.search(r'known_trip_count":\{"n":"?(\d+)', loop.attributes)
    if known:
        return int(known.group(1))
    condition = module.computations[loop.attribute("condition")]
    body = module.computations[loop.attribute("body")]
    compare = root(condition)
    if compare.opcode == "fusion":
        compare, condition = _unfused(module, condition, compare)
    if compare.opcode != "compare" or compare.attribute("direction") != "LT":
        return None
    counter, limit = (_follow(condition, name) for name in compare.operands)
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
        return None
    index = int(counter.attribute("index"))
    start = _element(computation, _follow(computation, loop.operands[0]), index)
    step = _step(body, index)
    if start is None or start.opcode != "constant" or step is None:
        return None
    return max(0, -(-(int(limit.arguments) - int(start.arguments)) // step))


def _follow(computation: dict[str, Op], name: str) -> Op:
    """The op behind copies and bitcasts."""
    op = computation[name]
    while op.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
        op = computation[op.operands[0]]
    return op


def _element(computation: dict[str, Op], op: Op, index: int) -> Op | None:
    return _follow(computation, op.operands[index]) if op.opcode == "tuple" else None


def _step(body: dict[str, Op], index: int) -> int | None:
    """Increment of element `index` of the loop's state in one iteration."""
    new = _element(body, root(body), index)
    if new is None or new.opcode != "add":
        return None
    sides = [_follow(body, name) for name in new.operands]
    constants = [int(op.arguments) for op in sides if op.opcode == "constant"]
    counters = [op for op in sides if op.opcode == "get-tuple-element"]
    same = len(counters) == 1 and counters[0].attribute("index") == str(index)
    return constants[0] if same and len(constants) == 1 and constants[0] > 0 else None


def _unfused(module: Module, outer: dict[str, Op], fusion: Op) -> tuple[Op, dict[str, Op]]:
    """The root of a fused condition, and its computation with its parameters replaced."""
    inner = dict(module.computations[fusion.attribute("calls")])
    for name, op in inner.items():
        if op.opcode == "parameter":
            inner[name] = _follow(outer, fusion.operands[int(op.arguments)])
    return root(module.computations[fusion.attribute("calls")]), inner
