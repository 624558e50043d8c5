"""What of JAX changes between versions and is used here? All of it, and nowhere else.

Works from jax 0.10.1 to 0.12. `jax.extend.core` is JAX's own door to jaxprs; parameters of the
primitives are its internals."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.extend.core import primitives as p

JIT, SCAN, REMAT, COND, WHILE = p.jit_p.name, p.scan_p.name, p.remat_p.name, "cond", "while"
# Calls that are not entered: what they compute is fixed by more than their jaxpr.
OPAQUE = (
    *("shard_map", "pallas_call", "ffi_call", "custom_partitioning", "custom_vmap_call"),
    *("pure_callback", "io_callback", "linear_call", "custom_lin"),
)
CUSTOM_JVP, CUSTOM_VJP = p.custom_jvp_call_p.name, p.custom_vjp_call_p.name

Literal = core.Literal
Jaxpr = Any  # core.Jaxpr or core.ClosedJaxpr


def open_jaxpr(jaxpr: Jaxpr) -> tuple[Any, Sequence[Any]]:
    """The equations, and the constants they close over. jax < 0.12 holds a ClosedJaxpr in the
    parameters of a call, later a Jaxpr that carries its constants."""
    if isinstance(jaxpr, core.ClosedJaxpr):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, getattr(jaxpr, "consts", ())


class Scan(NamedTuple):
    """The parameters of a scan equation."""

    body: Jaxpr
    consts: int
    carry: int
    length: int
    reverse: bool
    unroll: int


def scan_parts(params: dict[str, Any]) -> Scan:
    """jax < 0.12 counts constants and carry; 0.12 groups them in `ft_in`."""
    if "ft_in" in params:
        consts, carry, _ = (len(list(group)) for group in params["ft_in"].unpack())
    else:
        consts, carry = params["num_consts"], params["num_carry"]
    fixed = (params[name] for name in ("length", "reverse", "unroll"))
    return Scan(params["jaxpr"], consts, carry, *fixed)


def rebind(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """The equation's outputs for other inputs, custom derivatives included."""
    out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def inner_jaxprs(eqn: Any) -> Iterator[Jaxpr]:
    """The jaxprs that an equation calls."""
    return core.jaxprs_in_params(eqn.params)


def scope_name(eqn: Any) -> str:
    """The framework's name of the module, relative to the enclosing call."""
    return str(eqn.source_info.name_stack)


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Names what is computed inside as the original was named."""
    with jax.named_scope(name) if name else contextlib.nullcontext():
        yield


def jit_shardings(params: dict[str, Any]) -> tuple[list[Any], list[Any]] | None:
    """What a nested jit asks of the layout of its inputs and outputs, None for each that is free,
    so that its body and these constraints can stand for it; None if it asks for more."""
    layouts = (*params["in_layouts"], *params["out_layouts"])
    if any(x is not None for x in layouts) or params["compiler_options_kvs"]:
        return None

    def asked(sharding: Any) -> Any:
        return None if type(sharding).__name__ == "UnspecifiedValue" else sharding

    ins, outs = ([asked(s) for s in params[side]] for side in ("in_shardings", "out_shardings"))
    if not all(s is None or isinstance(s, jax.sharding.Sharding) for s in (*ins, *outs)):
        return None
    return ins, outs


def explicit_sharding(x: jax.Array) -> Any:
    """The sharding that is part of the type of x: that over the Explicit axes of a mesh; None if
    there are none."""
    return _explicit(jax.typeof(x).sharding)


def _explicit(sharding: Any) -> Any:
    kinds = getattr(sharding.mesh, "axis_types", None) or ()
    return sharding if jax.sharding.AxisType.Explicit in kinds else None


def placed_as(x: jax.Array, aval: Any) -> jax.Array:
    """x as its type was to be, where shardings are part of types."""
    wanted = _explicit(aval.sharding)
    return x if wanted is None else jax.sharding.reshard(x, wanted)


def branch_platforms(params: dict[str, Any]) -> Any:
    """For each branch of a cond the platforms it is for, None for the default; None if it is no
    choice of platforms."""
    return params.get("branches_platforms")


def gathered(x: jax.Array) -> jax.Array:
    """x whole on every device if its sharding is part of its type: a sort asks for that."""
    spec = jax.typeof(x).sharding.spec
    return jax.sharding.reshard(x, jax.P()) if any(spec) else x
