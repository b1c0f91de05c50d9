"""Topologies of absent machines: TPU slices by name, or a number of GPUs as fake CPU devices."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import re
from typing import Any

from ldm_jax.cost import tpu_cost

TPU_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask the cloud which TPU this machine has
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "MALLOC_ARENA_MAX": "1",  # the compiler's threads keep a fifth less memory
}
DIMENSIONS = {"v5e": 2, "v6e": 2, "v5p": 3}
"""Dimensions of the network between the chips of a slice."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that a program is compiled for."""

    kind: str
    """A chip of `tpu_cost.CHIPS`, or "gpu"."""
    sizes: tuple[int, ...]
    """Chips of a slice along each dimension of its network."""
    slices: int = 1

    @property
    def name(self) -> str:
        """`v5e:4x4`, as the compiler calls one slice."""
        return f"{self.kind}:{'x'.join(map(str, self.sizes))}"

    @property
    def num_devices(self) -> int:
        """Devices of all slices."""
        return math.prod(self.sizes) * self.slices

    @property
    def chip(self) -> tpu_cost.Chip | None:
        """Figures of one chip; None for a GPU."""
        return tpu_cost.CHIPS.get(self.kind)

    def __str__(self) -> str:
        return f"{self.slices} x {self.name}" if self.slices > 1 else self.name


def parse(text: str, slices: int = 1) -> Topology:
    """The topology of `v5e:16x16`, `v5p:4x4x4`, `v6e:16x16` or `gpu:8`.

    ValueError names the fault in the text and the valid forms.
    """
    kind, _, layout = text.partition(":")
    known = ", ".join((*DIMENSIONS, "gpu"))
    if kind not in (*DIMENSIONS, "gpu"):
        raise ValueError(f"--topology {text}: {kind!r} is not one of {known}; as v5e:4x4 or gpu:8")
    if slices < 1:
        raise ValueError(f"--slices {slices}: give at least 1")
    dimensions = DIMENSIONS.get(kind, 1)
    example = {1: "8", 2: "4x4", 3: "4x4x4"}[dimensions]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", layout) or layout.count("x") != dimensions - 1:
        raise ValueError(
            f"--topology {text}: {kind} takes {dimensions} size{'s' * (dimensions > 1)}, as"
            f" {kind}:{example}"
        )
    sizes = tuple(int(n) for n in layout.split("x"))
    if kind == "gpu" and slices > 1:
        raise ValueError(f"--slices {slices}: GPUs have no slices; give all of them as gpu:N")
    if kind != "gpu" and (sizes[0] % 2 or sizes[1] % 2):
        raise ValueError(
            f"--topology {text}: a host has 2x2 chips, so the first two sizes are even"
        )
    return Topology(kind, sizes, slices)


def environment(topology: Topology) -> dict[str, str]:
    """Variables of the process that compiles."""
    if topology.kind == "gpu":
        return {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={topology.num_devices}",
        }
    return TPU_ENVIRONMENT


def check_compiler(topology: Topology) -> None:
    """ImportError if the topology's compiler is not installed, with the command that installs
    it."""
    if topology.kind != "gpu" and importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"no compiler for {topology.name}: libtpu is not installed, which needs no TPU:"
            f" pip install --no-deps '{wanted_libtpu()}' (it must be the one of this jax, and"
            " --no-deps leaves jax as it is; the extra ldm-jax[plan] asks for the same)"
        )


def wanted_libtpu() -> str:
    """The requirement of the installed jax for libtpu, as pip takes it."""
    for requirement in importlib.metadata.requires("jax") or ():
        libtpu = re.match(r"(libtpu\S*)\s*;.*extra\s*==\s*['\"]tpu['\"]", requirement)
        if libtpu:
            return libtpu.group(1)
    return "libtpu"


def versions(topology: Topology) -> dict[str, str]:
    """Versions of all packages that affect the program."""
    names = ("jax", "jaxlib", "flax", "optax", "ldm-jax")
    names += () if topology.kind == "gpu" else ("libtpu",)
    return {name: version(name) for name in names}


def version(name: str) -> str:
    """Version of an installed package, or "unknown"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def devices(topology: Topology) -> list[Any]:
    """The devices to compile for. RuntimeError if the compiler does not know the topology."""
    import jax
    from jax.experimental import topologies

    if topology.kind == "gpu":
        return jax.devices()
    several = {"num_slices": topology.slices} if topology.slices > 1 else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **several)
    return list(described.devices)
