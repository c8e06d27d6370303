"""What TPUs are: published facts of each chip, and the slices that can be rented, by the names they are rented under.

    topology("v6e-256x2")     two slices of 256 chips, each a 16 x 16 torus

Sources: the pages "TPU v5e", "TPU v5p", "TPU v6e", "Ironwood (TPU7x)" of the Cloud TPU documentation; "How to Scale Your Model"
(jax-ml/scaling-book), part 2, for links one way and PCIe. Facts are per jax device: of a v5p chip both cores are one device, of a tpu7x
chip each core is one.
"""

import difflib
import math
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Chip:
    """clock: Hz. hbm: bytes that the compiler lets a program have. hbm_speed, host_speed: bytes/s to the memory and to the host.
    link: bytes/s one way over one link of the torus. network: bytes/s to other slices. dims: of the torus. cores: how many the
    marketing name counts for a chip. devices: what jax counts for a chip. platform, settings: what the compiler calls it."""

    kind: str
    clock: float
    hbm: float
    hbm_speed: float
    link: float
    network: float
    host_speed: float
    dims: int
    cores: int
    devices: int
    platform: str
    settings: str


_GIB = 2**30
CHIPS = {
    "v5e": Chip("TPU v5 lite", 1.5e9, 15.75 * _GIB, 0.82e12, 50e9, 3.125e9, 16e9, 2, 1, 1, "v5e", "default"),
    "v5p": Chip("TPU v5", 1.75e9, 95.73 * _GIB, 2.765e12, 100e9, 6.25e9, 16e9, 3, 2, 1, "v5p", "megacore"),
    "v6e": Chip("TPU v6 lite", 1.75e9, 31.24 * _GIB, 1.64e12, 100e9, 12.5e9, 32e9, 2, 1, 1, "v6e", "default"),
    "tpu7x": Chip("TPU7x", 2.2e9, 94.74 * _GIB, 3.69e12, 50e9, 6.25e9, 16e9, 3, 2, 2, "tpu7x", "default"),
}

# chips of a slice -> its shape
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBIC = {
    4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8), 512: (8, 8, 8),
    1024: (8, 8, 16), 2048: (8, 16, 16), 4096: (16, 16, 16), 6144: (16, 16, 24),
}  # fmt: skip


@dataclass(frozen=True)
class Topology:
    """`slices` slices of `shape` chips. Chips of a slice talk over the torus, slices over the data centre's network."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def size(self) -> int:
        """jax devices of all slices."""
        return self.chips * self.chip.devices

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which dims close into rings: whole cubes of 4 of the 3-d chips, sides of 16 of the others."""
        if self.chip.dims == 3:
            return tuple(n % 4 == 0 for n in self.shape) if all(n % 4 == 0 for n in self.shape) else (False,) * 3
        return tuple(n == 16 for n in self.shape)

    def devices(self) -> list[Any]:
        """Compile-only jax devices. They need libtpu, and no TPU."""
        from jax.experimental import topologies

        single = self.chips == 1
        settings = dict(chip_config_name=self.chip.settings, chips_per_host_bounds=(1, 1, 1) if single else (2, 2, 1))
        if self.slices > 1:
            settings["num_slices"] = self.slices
        name = f"{self.chip.platform}:{'x'.join(map(str, self.shape))}"
        wrap = (*self.wrap, False)[:3]
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, wrap=wrap, **settings).devices)


def topology(name: str) -> Topology:
    """The topology of a name such as v5e-16, v5p-128 or v6e-256x2. Raises ValueError listing those that there are."""
    found = re.fullmatch(r"([a-z]\w+)-(\d+)(?:x(\d+))?", name)
    family, count, slices = found.groups() if found else (name.split("-")[0], "0", None)
    if family not in CHIPS:
        near = difflib.get_close_matches(family, CHIPS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no topology {name!r}: its chip is none of {', '.join(CHIPS)}{hint} Known: {', '.join(known())}")
    chip = CHIPS[family]
    shapes = _CUBIC if chip.dims == 3 else _FLAT
    shape = shapes.get(int(count) // chip.cores) if int(count) % chip.cores == 0 else None
    if shape is None or slices == "0":
        counted = "cores, two a chip" if chip.cores == 2 else "chips"
        names = ", ".join(f"{family}-{n * chip.cores}" for n in shapes)
        raise ValueError(f"no topology {name!r} ({family} counts {counted}); there are {names}, and xN behind one for N slices of it")
    return Topology(name, chip, shape, int(slices or 1))


def known() -> list[str]:
    """Every name of one slice."""
    return [f"{family}-{n * chip.cores}" for family, chip in CHIPS.items() for n in (_CUBIC if chip.dims == 3 else _FLAT)]


def chip_of(device_kind: str) -> Chip:
    """The facts of a jax device. Raises ValueError for one that is not known."""
    for chip in CHIPS.values():
        if chip.kind == device_kind:
            return chip
    raise ValueError(f"no facts about {device_kind!r}; known are {', '.join(c.kind for c in CHIPS.values())}")
