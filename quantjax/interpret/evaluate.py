"""How is a traced model run on quantized parameters? Equation by equation, calls entered.

An equation without a parameter is bound again as it was. One with a parameter goes to its rule
(`rules`); without a rule the parameter becomes its float array, and that is recorded. Calls are
entered where JAX lets one enter without losing anything: jit, scan, remat, cond and while.
Functions with custom derivatives are not, as inlining would lose the derivative."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from quantjax.interpret import jax_compat as compat
from quantjax.interpret import rules
from quantjax.interpret.param import Param, layer, stack
from quantjax.interpret.products import PRODUCTS
from quantjax.interpret.record import Place, Record

Value = Any  # an array or a Param


@dataclasses.dataclass(frozen=True)
class Machine:
    """What an evaluation carries along: where it notes things, and whether it raises instead."""

    record: Record
    strict: bool = False

    def note(self, place: Place, path: str, primitive: str, reason: str) -> None:
        """Records what becomes float; raises under `strict`."""
        if self.strict:
            raise ValueError(f"{path}: {primitive} in {place.module or 'the model'}: {reason}.")
        self.record.remark(place, path, primitive, reason)

    def array(self, value: Value, place: Place, primitive: str, reason: str) -> Any:
        """The value as an array; noted if it was quantized."""
        if not isinstance(value, Param):
            return value
        if value.quantized:
            self.note(place, value.path, primitive, reason)
        return value.array()


def evaluate(
    machine: Machine, jaxpr: compat.Jaxpr, args: Sequence[Value], place: Place
) -> list[Value]:
    """The outputs of a jaxpr for these inputs; parameters among them come out as they are."""
    jaxpr, consts = compat.open_jaxpr(jaxpr)
    env: dict[Any, Value] = {}
    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(v: Any) -> Value:
        return v.val if isinstance(v, compat.Literal) else env[v]

    last = _last_uses(jaxpr)
    for i, eqn in enumerate(jaxpr.eqns):
        inputs = [read(v) for v in eqn.invars]
        name = compat.scope_name(eqn)
        with compat.scope(name):
            outputs = _equation(machine, eqn, inputs, place.inside(eqn, name))
        env.update(zip(eqn.outvars, outputs, strict=True))
        for v in last.get(i, ()):  # outside jit a value is freed after its last use
            del env[v]
    return [read(v) for v in jaxpr.outvars]


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """By equation, the variables that no later equation and no output reads."""
    last: dict[Any, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        for v in (*eqn.invars, *eqn.outvars):
            if not isinstance(v, compat.Literal):
                last[v] = i
    kept = {v for v in jaxpr.outvars if not isinstance(v, compat.Literal)}
    ends: dict[int, list[Any]] = {}
    for v, i in last.items():
        if v not in kept:
            ends.setdefault(i, []).append(v)
    return ends


def _equation(machine: Machine, eqn: Any, inputs: list[Value], place: Place) -> list[Value]:
    name = eqn.primitive.name
    call = _CALLS.get(name)
    if call is not None and (any(isinstance(x, Param) for x in inputs) or _has_products(eqn)):
        return call(machine, eqn, inputs, place)
    if not any(isinstance(x, Param) for x in inputs):
        if name in PRODUCTS:
            reason = "a product of two activations"
            machine.record.remark(place, "", name, reason)
        return compat.rebind(eqn, inputs)
    out = rules.apply(machine, eqn, inputs, place)
    if out is not None:
        return out
    reason = "dequantized here: no rule for this operation"
    return compat.rebind(eqn, _arrays(machine, inputs, place, name, reason))


def _has_products(eqn: Any) -> bool:
    """Whether a call holds a product, so that it is worth entering without a parameter."""
    for inner in compat.inner_jaxprs(eqn):
        jaxpr, _ = compat.open_jaxpr(inner)
        for e in jaxpr.eqns:
            if e.primitive.name in PRODUCTS or _has_products(e):
                return True
    return False


def _jit(machine: Machine, eqn: Any, inputs: list[Value], place: Place) -> list[Value]:
    if compat.is_plain_jit(eqn.params):
        return evaluate(machine, eqn.params["jaxpr"], inputs, place)
    reason = "dequantized here: a nested jit with shardings or compiler options"
    return compat.rebind(eqn, _arrays(machine, inputs, place, "jit", reason))


def _remat(machine: Machine, eqn: Any, inputs: list[Value], place: Place) -> list[Value]:
    body = eqn.params["jaxpr"]

    def run(*args: Value) -> list[Any]:
        return _arrays(machine, evaluate(machine, body, args, place), place, "remat")

    policy, cse = eqn.params["policy"], eqn.params["prevent_cse"]
    return jax.checkpoint(run, policy=policy, prevent_cse=cse)(*inputs)


def _scan(machine: Machine, eqn: Any, inputs: list[Value], place: Place) -> list[Value]:
    scan = compat.scan_parts(eqn.params)
    inside = dataclasses.replace(place, calls=place.calls * scan.length)
    consts, rest = inputs[: scan.consts], inputs[scan.consts :]
    carry = _arrays(machine, rest[: scan.carry], place, "scan", "dequantized here: a scan's carry")

    def enter(x: Value) -> tuple[Any, Param | None]:
        if not isinstance(x, Param):
            return x, None
        inner = stack(x)
        if inner is None:
            reason = "dequantized here: the layers of a scan are not its first axis"
            return machine.array(x, place, "scan", reason), None
        return inner, x

    entered = [enter(x) for x in rest[scan.carry :]]
    stacked, views = [inner for inner, _ in entered], [view for _, view in entered]

    def body(state: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        pairs = zip(slices, views, strict=True)
        seen = [s if view is None else layer(view, s) for s, view in pairs]
        out = evaluate(machine, scan.body, [*consts, *state, *seen], inside)
        out = _arrays(machine, out, inside, "scan")
        return out[: scan.carry], out[scan.carry :]

    end, ys = lax.scan(
        body, carry, stacked, length=scan.length, reverse=scan.reverse, unroll=scan.unroll
    )
    return [*end, *ys]


def _cond(machine: Machine, eqn: Any, inputs: list[Value], place: Place) -> list[Value]:
    index, *operands = inputs
    branches = [_branch(machine, b, place) for b in eqn.params["branches"]]
    return lax.switch(index, branches, *operands)


def _branch(machine: Machine, jaxpr: compat.Jaxpr, place: Place) -> Callable[..., list[Any]]:
    def run(*args: Value) -> list[Any]:
        return _arrays(machine, evaluate(machine, jaxpr, args, place), place, "cond")

    return run


def _while(machine: Machine, eqn: Any, inputs: list[Value], place: Place) -> list[Value]:
    p = eqn.params
    first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    start = _arrays(machine, inputs[second:], place, "while", "dequantized here: a loop's carry")

    def proceed(state: list[Any]) -> Any:
        return evaluate(machine, p["cond_jaxpr"], [*inputs[:first], *state], place)[0]

    def body(state: list[Any]) -> list[Any]:
        out = evaluate(machine, p["body_jaxpr"], [*inputs[first:second], *state], place)
        return _arrays(machine, out, place, "while")

    return lax.while_loop(proceed, body, start)


def _opaque(machine: Machine, eqn: Any, inputs: list[Value], place: Place) -> list[Value]:
    reason = "dequantized here: a function with a derivative of its own is not entered"
    name = eqn.primitive.name
    return compat.rebind(eqn, _arrays(machine, inputs, place, name, reason))


def _arrays(
    machine: Machine, values: Sequence[Value], place: Place, primitive: str, reason: str = ""
) -> list[Any]:
    reason = reason or f"dequantized here: the result of a {primitive}"
    return [machine.array(x, place, primitive, reason) for x in values]


_CALLS: dict[str, Callable[..., list[Value]]] = {
    compat.JIT: _jit,
    compat.REMAT: _remat,
    compat.SCAN: _scan,
    compat.COND: _cond,
    compat.WHILE: _while,
    compat.CUSTOM_JVP: _opaque,
    compat.CUSTOM_VJP: _opaque,
}
