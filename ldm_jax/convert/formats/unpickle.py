"""Unpickling without Python's objects: a machine that builds plain containers and runs no code.

Names in a pickle are never imported. A few are known and replaced by functions of ours; a class
that is not known becomes an `Opaque`, whose arguments and state are dropped; a call of any other
function is refused. Opcodes are read by the standard library's pickletools (protocols 0 to 5).
"""

import io
import pickletools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# Both bound the memory and the time that a small file can ask for. A complete Stable Diffusion
# checkpoint with its optimizer takes about 1 MiB and 150 000 steps.
MAX_BYTES = 64 * 2**20
MAX_STEPS = 2_000_000
MAX_NAME = 300  # characters of a class's name
MAX_TUPLES = 256  # entries of a dict or set with tuples as keys, whose hashes can be made equal
MAX_LINE = 2**16  # of the textual opcodes, which have no length field

REMEDY = "if you trust the file, load it once with torch and save its state_dict as safetensors"


class Opaque:
    """A class or function of a pickle, or an object of one, of which only the name is kept."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"Opaque({self.name!r})"


class Pickles:
    """Pickles that follow each other at the start of a file, as a stream for `load`."""

    def __init__(self, handle: io.BufferedReader, size: int):
        self.end = min(size, MAX_BYTES)
        self.handle = handle
        self.seek, self.tell = handle.seek, handle.tell

    def read(self, count: int) -> bytes:
        """Read at most the rest of the file: a pickle may claim any length for its buffer."""
        return self.handle.read(max(0, min(count, self.end - self.tell())))

    def readline(self) -> bytes:
        return self.handle.readline(MAX_LINE)


def load(
    stream: io.BytesIO | Pickles,
    functions: Mapping[str, Callable[..., Any]],
    persistent_load: Callable[[tuple], Any],
) -> Any:
    """The object pickled at the stream's position, which moves behind it.

    functions: "module.name" -> function to call, beside those of plain containers.
    persistent_load: persistent id (a tuple) -> its object.
    Raises ValueError for calls of other functions and for what exceeds the limits, and ValueError,
    LookupError or TypeError for damage.
    """
    machine = _Machine({**CONTAINERS, **functions}, persistent_load)
    for opcode, argument, _ in pickletools.genops(stream):
        machine.spend(1)
        if opcode.name in PUSH:
            machine.stack.append(argument)
        elif opcode.name not in IGNORED:
            step = STEPS.get(opcode.name)
            if step is None:
                raise ValueError(f"pickle opcode {opcode.name} is not supported; {REMEDY}")
            step(machine, argument)
    (result,) = machine.stack
    return result


class _Machine:
    def __init__(self, functions: Mapping[str, Callable], persistent_load: Callable):
        self.stack: list = []
        self.outer: list[list] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.steps = MAX_STEPS
        self.functions = functions
        self.persistent_load = persistent_load

    def spend(self, count: int) -> None:
        self.steps -= count
        if self.steps < 0:
            raise ValueError(f"a pickle of more than {MAX_STEPS} steps")

    def since_mark(self) -> list:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def remember(self, index: int) -> None:
        if not 0 <= index < 2**32:  # hashes of larger ones can be made equal
            raise ValueError("a pickle that counts its objects with no small number")
        self.memo[index] = self.stack[-1]

    def find(self, module: Any, name: Any) -> None:
        self.stack.append(_global(module, name, self.functions))

    def call(self, callee: Any, args: Any) -> None:
        """Pushes the result; the one place where a pickle makes anything happen."""
        if type(args) is not tuple or type(callee) is not Opaque:
            raise ValueError("a pickle calls what is neither a class nor a function")
        known = self.functions.get(callee.name)
        if known is not None:
            self.spend(len(args))
            self.spend(sum(len(x) for x in args if isinstance(x, (list, dict, tuple, set))))
            result = known(*args)
        elif _is_class(callee.name):
            result = Opaque(callee.name)
        else:
            raise _could_run("calls", callee.name)
        self.stack.append(result)

    def set_items(self, pairs: list) -> None:
        target = self.stack[-1]
        if len(pairs) % 2:
            raise ValueError("a pickle with a key without a value")
        if type(target) is dict:
            _fill(target, zip(pairs[::2], pairs[1::2]))
        elif type(target) is not Opaque:
            raise ValueError("a pickle sets items of what is no dict")

    def extend(self, kind: type, items: list) -> None:
        target = self.stack[-1]
        if type(target) is list and kind is list:
            target.extend(items)
        elif type(target) is set and kind is set:
            _add(target, items)
        elif type(target) is not Opaque:
            raise ValueError(f"a pickle adds to what is no {kind.__name__}")

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_or_mark(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("a pickle takes more from its stack than there is")
        self.stack[-count:] = [tuple(self.stack[-count:])]


def _global(module: Any, name: Any, known: Mapping) -> Opaque:
    """`Opaque` for a name. ValueError for names of the standard library not known to be
    harmless."""
    if type(module) is not str or type(name) is not str:
        raise ValueError("a pickle names a class by what is no text")
    full = f"{module[: MAX_NAME + 1]}.{name[: MAX_NAME + 1]}"  # texts may be long, and named often
    if len(full) > MAX_NAME or not all(part.isidentifier() for part in full.split(".")):
        raise ValueError("a pickle names a class by what is no name")
    top = module.partition(".")[0]
    if full not in known and full not in HARMLESS and top in STANDARD:
        raise _could_run("asks for", full)
    return Opaque(full)


def _could_run(how: str, name: str) -> ValueError:
    return ValueError(f"it {how} {name}, which could run any code; {REMEDY}")


def _is_class(name: str) -> bool:
    """True if a name is spelled like a class: nothing is imported, so nothing else can be known."""
    return name in HARMLESS or name.rpartition(".")[2].lstrip("_")[:1].isupper()


def _key(key: Any) -> Any:
    """ValueError unless hashing it is quick: tuples of tuples of tuples take exponential time."""
    parts = key if type(key) is tuple else (key,)
    if len(parts) > 16 or not all(_quick(part) for part in parts):
        raise ValueError(f"a pickle with a key of type {type(key).__name__}")
    return key


def _quick(part: Any) -> bool:
    if type(part) is int:
        return part.bit_length() <= 64
    return part is None or type(part) in (str, bytes, bool, float, Opaque)


def _dict(*args: Any) -> dict:
    """A dict from the arguments of dict, OrderedDict, defaultdict (its factory is dropped)."""
    source = next((arg for arg in args if type(arg) in (dict, list, tuple)), ())
    result: dict = {}
    _fill(result, source.items() if type(source) is dict else source)
    return result


def _fill(target: dict, pairs: Iterable) -> None:
    """Fill a dict. ValueError for a duplicate key, which no pickled dict has."""
    for key, value in pairs:
        if type(key) is tuple and len(target) >= MAX_TUPLES:
            raise ValueError(f"a dict of more than {MAX_TUPLES} keys, tuples among them")
        if _key(key) in target:
            raise ValueError(f"{key!r:.200} stands there twice")
        target[key] = value


def _set(items: Any = ()) -> set:
    if type(items) not in (list, tuple, set, dict):  # a string may be long: not counted
        raise ValueError(f"a pickle makes a set of a {type(items).__name__}")
    return _add(set(), items)


def _add(target: set, items: Iterable) -> set:
    for item in items:
        if type(item) is tuple and len(target) >= MAX_TUPLES:
            raise ValueError(f"a set of more than {MAX_TUPLES} items, tuples among them")
        target.add(_key(item))
    return target


def _getattr(owner: Any = None, name: Any = None, *default: Any) -> Opaque:
    """Members of enumerations, as Python 3.11 pickles them; the attribute is named, not read."""
    if type(owner) is not Opaque or type(name) is not str or default:
        raise _could_run("calls", "builtins.getattr")
    if len(owner.name) + len(name) >= MAX_NAME:
        raise ValueError("a pickle names a class by what is no name")
    if not name.isidentifier():
        raise _could_run("calls", "builtins.getattr")
    return Opaque(f"{owner.name}.{name}")


def _opaque(name: str) -> Callable[..., Opaque]:
    return lambda *args: Opaque(name)


# Names of the standard library are refused unless known: any could run code when called.
STANDARD = {*sys.stdlib_module_names, "__builtin__", "copy_reg", "commands"} - {"typing"}
_BUILTINS = ("builtins", "__builtin__")
NO_VALUE = (
    "_codecs.encode",
    "_operator.getitem",
    "copy_reg._reconstructor",
    "copyreg._reconstructor",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "operator.getitem",
    "torch.device",
)
CONTAINERS = {
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _dict,
    "collections.Counter": _dict,
    "torch.nn.modules.container.ParameterDict": _dict,
    **{f"{module}.getattr": _getattr for module in _BUILTINS},
    **{f"{module}.dict": _dict for module in _BUILTINS},
    **{f"{module}.{name}": _set for module in _BUILTINS for name in ("set", "frozenset")},
    # Functions that Lightning checkpoints call for values that are not needed here.
    **{name: _opaque(name) for name in NO_VALUE},
}
PLAIN = (
    *("bool", "bytearray", "bytes", "complex", "float", "int", "list", "long", "object", "range"),
    *("slice", "str", "tuple", "unicode"),
)
HARMLESS = {
    "argparse.Namespace",
    "collections.deque",
    "functools.partial",
    "numpy.ndarray",
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(f"pathlib.{kind}" for kind in ("Path", "PosixPath", "WindowsPath")),
    *(f"pathlib.Pure{kind}" for kind in ("Path", "PosixPath", "WindowsPath")),
    *(f"pathlib._local.{kind}" for kind in ("Path", "PosixPath", "WindowsPath")),
    *(f"{module}.{name}" for module in _BUILTINS for name in PLAIN),
}

PUSH = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
IGNORED = {"PROTO", "FRAME", "STOP"}


def _reduce(m: _Machine, _):
    args = m.pop()
    m.call(m.pop(), args)


def _inst(m: _Machine, names: str):
    args = tuple(m.since_mark())
    m.find(*names.split(" ", 1))
    m.call(m.pop(), args)


def _obj(m: _Machine, _):
    callee, *args = m.since_mark()
    m.call(callee, tuple(args))


def _newobj_ex(m: _Machine, _):
    m.pop()  # keyword arguments
    _reduce(m, _)


def _stack_global(m: _Machine, _):
    name = m.pop()
    m.find(m.pop(), name)


def _append(m: _Machine, _):
    item = m.pop()
    m.extend(list, [item])


def _setitem(m: _Machine, _):
    value = m.pop()
    key = m.pop()
    m.set_items([key, value])


def _dict_of_mark(m: _Machine, _):
    pairs = m.since_mark()
    m.push({})
    m.set_items(pairs)


def _build(m: _Machine, _):
    state = m.pop()  # of an `Opaque`, or attributes of a container or tensor
    if not m.stack:
        raise ValueError("a pickle sets the state of nothing")
    held = state.get("_parameters") if type(state) is dict else None
    if (
        type(held) is dict and type(m.stack[-1]) is dict and not m.stack[-1]
    ):  # torch's ParameterDict keeps its items so
        m.spend(len(held))
        _fill(m.stack[-1], held.items())


def _get(m: _Machine, index: int):
    m.push(m.memo[index])


STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_SET": lambda m, _: m.push(set()),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "MARK": lambda m, _: m.mark(),
    "POP": lambda m, _: m.pop_or_mark(),
    "POP_MARK": lambda m, _: m.since_mark(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    "LIST": lambda m, _: m.push(m.since_mark()),
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "FROZENSET": lambda m, _: m.push(_set(m.since_mark())),
    "DICT": _dict_of_mark,
    "APPEND": _append,
    "APPENDS": lambda m, _: m.extend(list, m.since_mark()),
    "ADDITEMS": lambda m, _: m.extend(set, m.since_mark()),
    "SETITEM": _setitem,
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "GET": _get,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "PUT": lambda m, index: m.remember(index),
    "BINPUT": lambda m, index: m.remember(index),
    "LONG_BINPUT": lambda m, index: m.remember(index),
    "MEMOIZE": lambda m, _: m.remember(len(m.memo)),
    "GLOBAL": lambda m, names: m.find(*names.split(" ", 1)),
    "STACK_GLOBAL": _stack_global,
    "INST": _inst,
    "OBJ": _obj,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _newobj_ex,
    "BUILD": _build,
    "BINPERSID": lambda m, _: m.push(m.persistent_load(m.pop())),
}
