"""What did the evaluator meet? Sites, where a product uses a parameter, and what it left float."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Site:
    """One product that uses a parameter.

    path: the parameter's key path. primitive: the JAX operation. module: the framework's name of
    the place. contracting, batch, output: the axes of the parameter, as it is stored without the
    layers a scan takes off, that are summed over, shared with the other operand, and kept.
    groups: blocks of the output that see different inputs (grouped convolutions). param_shape,
    input_shape, output_shape: of one call. calls: how often it runs (the lengths of enclosing
    scans). flops: of all calls, two a multiply-add. layers: leading axes taken off by scans.
    format: of the stored parameter. beside: what it holds beside its codes, an input scale or
    factors of low rank. term_flops: of products with the latter. act: of the activation, empty
    where it stays as it is. lowering: how the product is computed.
    """

    path: str
    primitive: str
    module: str
    contracting: tuple[int, ...]
    batch: tuple[int, ...]
    output: tuple[int, ...]
    param_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    flops: int
    calls: int = 1
    groups: int = 1
    layers: int = 0
    format: str = "float32"
    beside: str = ""
    term_flops: int = 0
    act: str = ""
    lowering: str = "float"

    @property
    def low_precision(self) -> bool:
        """Whether the product itself is one of integers or of 8-bit floats."""
        return self.contracting != () and not self.lowering.startswith("float")


@dataclasses.dataclass(frozen=True)
class Remark:
    """Something that stayed, or became, float: which parameter if any, where, and why. flops: if
    it is a product."""

    path: str
    primitive: str
    module: str
    reason: str
    flops: int = 0


class Sites(tuple[Site, ...]):
    """The products of a model that use parameters, in the order of the program, and `remarks`:
    where a parameter enters what is not entered, so that its products are not known."""

    remarks: tuple[Remark, ...]

    def __new__(cls, sites: Iterable[Site], remarks: Iterable[Remark] = ()) -> "Sites":
        """The sites, with remarks beside them."""
        made = super().__new__(cls, sites)
        made.remarks = tuple(remarks)
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self), self.remarks


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in the program an equation stands: the calls around it, as its key; the modules'
    names; how often it runs."""

    key: tuple[int, ...] = ()
    module: str = ""
    calls: int = 1

    def inside(self, eqn: Any, name: str) -> "Place":
        """The place of an equation of this body, or of the body it calls."""
        module = "/".join(part for part in (self.module, name) if part)
        return Place((*self.key, id(eqn)), module, self.calls)


class Record:
    """Sites and remarks by place, in the order of the program: a body that JAX traces twice is
    noted once. The one mutable thing here; it lives as long as one trace."""

    def __init__(self) -> None:
        self._sites: dict[Any, Site] = {}
        self._remarks: dict[Any, Remark] = {}

    def site(self, place: Place, site: Site) -> None:
        """Notes a product."""
        # Both operands of one product may be views of one parameter.
        self._sites[place.key, site.path, site.contracting, site.batch] = site

    def remark(self, place: Place, path: str, primitive: str, reason: str, flops: int = 0) -> None:
        """Notes what stays float; `flops` of one call."""
        remark = Remark(path, primitive, place.module, reason, flops * place.calls)
        self._remarks[place.key, path] = remark

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites, in the order of the program."""
        return tuple(self._sites.values())

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """All remarks, in the order of the program."""
        return tuple(self._remarks.values())


def product(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """The number of elements along some axes."""
    return math.prod(shape[a] for a in axes)
