"""Options of commands: dataclasses that tyro parses, a docstring for each field's help."""

import dataclasses
import inspect
import re
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import FlagCreatePairsOff, arg

from ldm_jax import finite

T = TypeVar("T")

Dir = Annotated[str, arg(metavar="DIR")]
File = Annotated[str, arg(metavar="FILE")]
Path = Annotated[str, arg(metavar="PATH")]
Text = Annotated[str, arg(metavar="TEXT")]
Files = Annotated[tuple[str, ...], arg(metavar="FILE ...", help_behavior_hint="")]
Texts = Annotated[tuple[str, ...], arg(metavar="TEXT ...", help_behavior_hint="")]
Adapters = Annotated[tuple[str, ...], arg(metavar="FILE[:UNET[:TEXT]] ...", help_behavior_hint="")]
Embeddings = Annotated[tuple[str, ...], arg(metavar="FILE[=<NAME>] ...", help_behavior_hint="")]
Ids = Annotated[tuple[int, ...], arg(metavar="ID ...", help_behavior_hint="")]
Classes = Annotated[tuple[str | int, ...], arg(metavar="CLASS ...", help_behavior_hint="")]
OptionalDir = Annotated[str | None, arg(metavar="DIR")]
OptionalFile = Annotated[str | None, arg(metavar="FILE")]
NAMES = {int: "N", float: "NUMBER", str: "TEXT"}
"""Names of values in --help, where tyro would write INT, FLOAT, STR and {None}|INT."""

REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.primitive_rule
def _named(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Read a value of `NAMES`, or None where it may be that, as tyro does, under our name."""
    alone = [kind for kind in NAMES if info.type in (kind, kind | None)]
    if not alone:
        return None
    (kind,), optional = alone, info.type not in NAMES

    def is_instance(value: Any) -> bool:
        known = (int, float) if kind is float else kind
        return (optional and value is None) or isinstance(value, known)

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=NAMES[kind],
        instance_from_str=lambda words: None if optional and words[0] == "None" else kind(words[0]),
        is_instance=is_instance,
        str_from_instance=lambda value: [str(value)],
    )


@dataclasses.dataclass(frozen=True)
class Common:
    """Options of every command."""

    debug: FlagCreatePairsOff[bool] = False
    """Print the traceback of an error."""
    compilation_cache: FlagCreatePairsOff[bool] = True
    """Compile every program again, and keep none in JAX_COMPILATION_CACHE_DIR (default:
    ldm_jax in the user's cache folder)."""
    version: FlagCreatePairsOff[bool] = False
    """Print the versions of ldm_jax and JAX."""


@dataclasses.dataclass(frozen=True)
class Process(Common):
    """Options of every command that several processes can run together."""

    distributed: Annotated[str | None, arg(metavar="[ADDRESS:PORT,PROCESSES,INDEX]")] = None
    """Join the processes of a cluster as this one of them; alone: as the launcher says, which must
    be there; `off`: run alone. Default: as Cloud TPU, SLURM, Open MPI or Kubernetes say, if one of
    them started this process."""


def parse(argv: Sequence[str], program: str, description: str, *parts: Any) -> list[Any]:
    """Parse argv into an instance of each part; a wrong option ends with exit code 2.

    ValueError for a number that is not finite.

    parts: dataclasses, or instances of them, which hold the defaults.
    """
    fields = []
    for i, part in enumerate(parts):
        alone = isinstance(part, type)
        kind = Annotated[in_order(part) if alone else type(part), arg(name="")]
        default = () if alone else (dataclasses.field(default=part),)
        fields.append((f"part{i}", kind, *default))
    parsed = tyro.cli(
        dataclasses.make_dataclass("Command", fields, kw_only=True),
        args=complete(argv),
        prog=program,
        description=" ".join(description.split()),
        config=(tyro.conf.AvoidSubcommands,),
        registry=REGISTRY,
    )
    values = [getattr(parsed, f"part{i}") for i in range(len(parts))]
    for value in values:
        finite.check_fields(value)
    return [_as(part, x) if isinstance(part, type) else x for part, x in zip(parts, values)]


def parse_known(argv: Sequence[str], program: str, kind: type[T]) -> tuple[T, list[str]]:
    """Parse the options of one dataclass among others; return it and the other words of argv."""
    known, rest = tyro.cli(
        kind, args=complete(argv), prog=program, return_unknown_args=True, add_help=False
    )
    finite.check_fields(known)
    return known, rest


def complete(argv: Sequence[str]) -> list[str]:
    """Write `--distributed` alone as `--distributed auto`: tyro has no optional values."""
    words = []
    for word, after in zip(argv, [*argv[1:], "-"]):
        words.append(word)
        if word == "--distributed" and after.startswith("-"):
            words.append("auto")
    return words


def in_order(kind: type) -> type:
    """Copy of a dataclass whose --help shows required options, its own, and those of its bases."""
    bases = [base for base in kind.__mro__ if dataclasses.is_dataclass(base)]

    def place(field: dataclasses.Field) -> tuple[bool, int]:
        owners = [field.name in inspect.get_annotations(base) for base in bases]
        return not _required(field), owners.index(True)

    fields = {f.name: f for f in sorted(dataclasses.fields(kind), key=place)}
    body = {"__doc__": kind.__doc__, "__dataclass_fields__": fields, "__annotations__": {}}
    return type(kind.__name__, (kind,), body)


def summary(docstring: str | None) -> str:
    """First sentence of a docstring, on one line."""
    text = " ".join((docstring or "").split())
    return re.split(r"(?<=\.)\s(?=[A-Z])", text, maxsplit=1)[0]


def _required(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _as(kind: type, values: Any) -> Any:
    return kind(**{f.name: getattr(values, f.name) for f in dataclasses.fields(kind)})
