"""How is a traced model run on quantized parameters? Equation by equation, calls entered.

An equation without a parameter is bound again as it was. One with a parameter goes to its rule
(`rules`); without a rule the parameter becomes its float array, and that is recorded. Calls are
entered where JAX lets one enter without losing anything: jit, scan, remat, cond, while, and
functions with a custom JVP, which keep it. Those with a custom VJP are not entered, as its
residuals are made of what the function was given; nor are shard_map, kernels and foreign calls."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from quantjax.interpret import jax_compat as compat
from quantjax.interpret import rules
from quantjax.interpret.layouts import laid_out
from quantjax.interpret.param import Param, layer, stack, stack_slot
from quantjax.interpret.products import FAKE, PRODUCTS
from quantjax.interpret.record import Place, Record
from quantjax.interpret.statistics import Statistics

Value = Any  # an array or a Param
_NO_RULE = "dequantized here: no rule for this operation"
_NOT_ENTERED = "dequantized here: not entered"
_INSIDE = "not entered: products inside stay as they are"


@dataclasses.dataclass(frozen=True)
class Machine:
    """What an evaluation carries along: where it notes things, whether it raises instead, and what
    it gathers of activations, which goes in and out of every body that JAX traces on its own."""

    record: Record
    strict: bool = False
    statistics: Statistics = dataclasses.field(default_factory=Statistics)

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
        elif value.trained is not None:
            self.record.remark(place, value.path, primitive, FAKE)
        return value.array()


def constrained(machine: Machine, x: Value, sharding: Any, place: Place, primitive: str) -> Value:
    """The value under a sharding constraint; its codes and scales if they can be cut alike."""
    if isinstance(x, Param):
        view = laid_out(x, sharding, lax.with_sharding_constraint)
        if view is not None:
            return view
    x = machine.array(x, place, primitive, "dequantized here: its codes can not be laid out so")
    return lax.with_sharding_constraint(x, sharding)


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
            outputs = equation(machine, eqn, inputs, place.inside(eqn, name))
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


def equation(machine: Machine, eqn: Any, inputs: list[Value], place: Place) -> list[Value]:
    """The outputs of one equation; parameters among them come out as they are."""
    name = eqn.primitive.name
    call = _CALLS.get(name)
    used = any(isinstance(x, Param) for x in inputs)
    if call is not None and (used or has_products(eqn)):
        return call(machine, eqn, inputs, place)
    if not used:
        if name in PRODUCTS:
            machine.record.remark(place, "", name, "a product of two activations", flops(eqn))
        elif call is None and has_products(eqn):
            machine.record.remark(place, "", name, _INSIDE)
        return compat.rebind(eqn, inputs)
    if name in PRODUCTS:
        machine.statistics.see(eqn, inputs)
    out = rules.apply(machine, eqn, inputs, place)
    if out is not None:
        pairs = zip(out, eqn.outvars, strict=True)
        return [y if isinstance(y, Param) else compat.placed_as(y, v.aval) for y, v in pairs]
    return compat.rebind(eqn, _arrays(machine, inputs, place, name, _NO_RULE))


def flops(eqn: Any) -> int:
    """Of one product, two a multiply-add."""
    p, sides = eqn.params, [v.aval for v in eqn.invars[:2]]
    if "rhs_dilation" in p:
        shape = sides[1].shape
        terms = math.prod(shape[a] for a in p["dimension_numbers"].rhs_spec[1:])
    else:
        ragged = p.get("ragged_dot_dimension_numbers")
        numbers = p["dimension_numbers"] if ragged is None else ragged.dot_dimension_numbers
        terms = math.prod(sides[0].shape[a] for a in numbers[0][0])
    return 2 * math.prod(eqn.outvars[0].aval.shape) * terms


def has_products(eqn: Any) -> bool:
    """Whether a call holds a product, so that it is worth entering without a parameter."""
    for inner in compat.inner_jaxprs(eqn):
        jaxpr, _ = compat.open_jaxpr(inner)
        for e in jaxpr.eqns:
            if e.primitive.name in PRODUCTS or has_products(e):
                return True
    return False


def _jit(machine: Machine, eqn: Any, inputs: list[Value], place: Place) -> list[Value]:
    asked = compat.jit_shardings(eqn.params)
    if asked is None:
        reason = "dequantized here: a nested jit with layouts or compiler options"
        return compat.rebind(eqn, _arrays(machine, inputs, place, "jit", reason))

    def constrain(values: Sequence[Value], shardings: Sequence[Any]) -> list[Value]:
        pairs = zip(values, shardings, strict=True)
        return [x if s is None else constrained(machine, x, s, place, "jit") for x, s in pairs]

    ins, outs = asked
    out = evaluate(machine, eqn.params["jaxpr"], constrain(inputs, ins), place)
    return constrain(out, outs)


def _remat(machine: Machine, eqn: Any, inputs: list[Value], place: Place) -> list[Value]:
    body = eqn.params["jaxpr"]
    if machine.statistics.watches:  # nothing is differentiated
        return evaluate(machine, body, inputs, place)

    def run(*args: Value) -> list[Any]:
        return _arrays(machine, evaluate(machine, body, args, place), place, "remat")

    policy, cse = eqn.params["policy"], eqn.params["prevent_cse"]
    return jax.checkpoint(run, policy=policy, prevent_cse=cse)(*inputs)


def _scan(machine: Machine, eqn: Any, inputs: list[Value], place: Place) -> list[Value]:
    scan = compat.scan_parts(eqn.params)
    inside = dataclasses.replace(place, calls=place.calls * scan.length)
    consts, rest = inputs[: scan.consts], inputs[scan.consts :]
    carry = _arrays(machine, rest[: scan.carry], place, "scan", "dequantized here: a scan's carry")

    def enter(x: Value) -> tuple[tuple[Any, Any], Param | None]:
        if not isinstance(x, Param):
            return (x, None), None
        inner = stack(x)
        if inner is None:
            reason = "dequantized here: the layers of a scan are not its first axis"
            return (machine.array(x, place, "scan", reason), None), None
        return (inner, stack_slot(x)), x

    entered = [enter(x) for x in rest[scan.carry :]]
    stacked, views = [inner for inner, _ in entered], [view for _, view in entered]

    def body(carried: Any, slices: list[Any]) -> tuple[Any, list[Any]]:
        machine.statistics.state, state = carried
        pairs = zip(slices, views, strict=True)
        seen = [x if view is None else layer(view, x, slot) for (x, slot), view in pairs]
        out = evaluate(machine, scan.body, [*consts, *state, *seen], inside)
        out = _arrays(machine, out, inside, "scan")
        return (machine.statistics.state, out[: scan.carry]), out[scan.carry :]

    start = (machine.statistics.state, carry)
    (machine.statistics.state, end), ys = lax.scan(
        body, start, stacked, length=scan.length, reverse=scan.reverse, unroll=scan.unroll
    )
    return [*end, *ys]


def _cond(machine: Machine, eqn: Any, inputs: list[Value], place: Place) -> list[Value]:
    index, *operands = inputs
    branches = [_branch(machine, b, place) for b in eqn.params["branches"]]
    platforms = compat.branch_platforms(eqn.params)
    operands = [machine.statistics.state, *operands]
    if platforms is None:
        machine.statistics.state, out = lax.switch(index, branches, *operands)
        return out
    # Each platform compiles its own branch alone; the others may not exist for it.
    pairs = list(zip(platforms, branches, strict=True))
    default = next((run for names, run in pairs if names is None), None)
    own = {name: run for names, run in pairs if names is not None for name in names}
    machine.statistics.state, out = lax.platform_dependent(*operands, default=default, **own)
    return out


def _branch(machine: Machine, jaxpr: compat.Jaxpr, place: Place) -> Callable[..., Any]:
    def run(statistics: Any, *args: Value) -> tuple[Any, list[Any]]:
        machine.statistics.state = statistics
        out = _arrays(machine, evaluate(machine, jaxpr, args, place), place, "cond")
        return machine.statistics.state, out

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

    if not machine.statistics.watches:
        return lax.while_loop(proceed, body, start)

    # The condition's products are observed as well, so it runs where state can leave it.
    def observed(carried: Any) -> Any:
        _, machine.statistics.state, state = carried
        state = body(state)
        return proceed(state), machine.statistics.state, state

    begin = (proceed(start), machine.statistics.state, start)
    _, machine.statistics.state, end = lax.while_loop(lambda c: c[0], observed, begin)
    return end


def _custom_jvp(machine: Machine, eqn: Any, inputs: list[Value], place: Place) -> list[Value]:
    """Its value is entered; its derivative stays the user's rule, run on float arrays."""
    if machine.statistics.watches:  # nothing is differentiated
        return evaluate(machine, eqn.params["call_jaxpr"], inputs, place)

    @jax.custom_jvp
    def run(*args: Value) -> list[Any]:
        out = evaluate(machine, eqn.params["call_jaxpr"], args, place)
        return _arrays(machine, out, place, eqn.primitive.name)

    def original(*args: Value) -> list[Any]:
        return compat.rebind(eqn, [x.array() if isinstance(x, Param) else x for x in args])

    @run.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        return run(*primals), jax.jvp(original, primals, tangents)[1]

    return run(*inputs)


def _opaque(machine: Machine, eqn: Any, inputs: list[Value], place: Place) -> list[Value]:
    """What must not be opened, or is not known to be a call: it gets float arrays."""
    name = eqn.primitive.name
    for x in inputs:
        if isinstance(x, Param) and not x.quantized:
            machine.record.remark(place, x.path, name, "not entered")
    if not any(isinstance(x, Param) for x in inputs):
        machine.record.remark(place, "", name, _INSIDE)
    return compat.rebind(eqn, _arrays(machine, inputs, place, name, _NOT_ENTERED))


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
    compat.CUSTOM_JVP: _custom_jvp,
    compat.CUSTOM_VJP: _opaque,
    **dict.fromkeys(compat.OPAQUE, _opaque),
}
