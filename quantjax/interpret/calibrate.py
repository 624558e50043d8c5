"""Which static scales do the activations of a model get? Run batches through it and observe.
Jacob et al. 2018, arXiv:1712.05877, section 3.1; the percentile: Wu et al. 2020,
arXiv:2004.09602, section 4."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from quantjax.formats import is_learned
from quantjax.interpret.evaluate import Machine
from quantjax.interpret.intercept import is_array, record_of, run
from quantjax.interpret.method import Method, Run, journal_of
from quantjax.interpret.once import Frame, jit_once, taken_apart
from quantjax.interpret.pieces import arguments
from quantjax.interpret.record import Record, Site
from quantjax.interpret.statistics import (
    State,
    Statistics,
    Watch,
    check_finite,
    check_reached,
    empty,
    restored,
)
from quantjax.observers import Observer, percentile
from quantjax.paths import named_leaves
from quantjax.policy import Policy, Resolved, preset
from quantjax.qtensor import QTensor, is_qtensor
from quantjax.spec import Granularity, QuantSpec
from quantjax.transform import quantize

OBSERVER = percentile(99.99)  # of activations that were not marked static


def calibrate(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    policy: Any = None,
    *,
    observer: Observer | None = None,
    state: Mapping[str, Any] | None = None,
    on_batch: Callable[[int, dict[str, Any]], Any] | None = None,
) -> Any:
    """The quantized tree with static activation scales, found by running batches.

    Runs `apply(params, batch)` in floats and observes, at each product that uses a parameter whose
    policy quantizes activations, the activation as a whole; its range gives the one scale (and
    zero point) of that parameter, whatever batch size or length comes later:
    s = range / largest level. A parameter that a scan stacks has one a layer; one that is used
    several times, in several places or in each step of a scan, has one for all its uses. What
    a branch sees counts only where it is taken.

    batches: an iterable. A plain tuple is spread over `apply(params, *batch)`, anything else is
    one argument; leaves that are not arrays are static. Shapes may differ, and compile anew.
    policy: a Policy, a preset name or a resolved policy, resolved with the sites of the first
    batch; or a method of `quantjax.ptq`, which quantizes as it sees fit on the batches, all of
    them held in memory: it leaves only static activation scales to be found here, if its policy
    asks for them, and calls `on_batch` after each part that is finished, with a `state` that
    belongs to it. None if leaves of `params` are QTensors already: they keep their codes. All its
    activations become static, with one scale a tensor. observer: of their range; without it those
    marked `static` keep their own, others get percentile(99.99). The embedding that is only
    looked up, and what only a policy's `otherwise` names and no product uses, drop their
    activation and stay quantized.
    on_batch: called as on_batch(i, state) after each batch, for a progress bar or checkpoints
    (`qj.save`). state: one of those, to go on from: the result is that of one run, bit for bit;
    with a resolved policy, or a quantized tree, no further batches are needed.

    Raises ValueError, naming the parameter, where an activation holds NaN or infinity (with the
    number of the batch), where no batch came to its product (an expert never chosen, a layer never
    run), and where the policy asks by name for an activation that no product has; and for a
    policy without activations, for no batches, and for a state of other parameters.

    >>> import jax.numpy as jnp
    >>> import quantjax as qj
    >>> apply = lambda p, x: x @ p["kernel"]
    >>> batches = [jnp.array([[0.5, -2.0]]), jnp.array([[2.54, 0.0]])]
    >>> params = {"kernel": jnp.array([[1.0, -2.0], [0.5, 4.0]])}
    >>> q = calibrate(apply, params, batches, "w8a8", observer=qj.absmax())
    >>> q["kernel"].act_scale
    Array(0.02, dtype=float32)

    A progress bar is one around the batches: `calibrate(apply, params, tqdm(batches), "w8a8")`.
    """
    _checkarguments(batches, policy)
    if isinstance(policy, Method):
        return _by_method(apply, params, batches, policy, observer, state, on_batch)
    batches = iter(batches)
    first = list(itertools.islice(batches, 1))
    if not first and state is None:
        raise ValueError("calibrate: expected at least one batch, got none: no range to observe.")
    floats, statistics = _without_activations(params), Statistics()
    sites: tuple[Site, ...] = ()
    if first:
        sites = record_of(apply, (floats, *arguments(first[0])), {}, statistics).sites
    elif isinstance(policy, Policy | str):
        raise ValueError(
            "calibrate: without a batch there is no model to see, and a policy can not be resolved "
            "as it was with one: pass policy.resolve(params, quantjax.sites(apply, params, x))."
        )
    tree, by_name = _quantized(params, policy, sites, observer)
    met = kept = set(state or ())
    if first:
        met = statistics.seen
        kept = met | (by_name - {site.path for site in sites})
    watches = {path: watch for path, watch in _watches(tree).items() if path in kept}
    start = empty(watches)
    found = start if state is None else restored(state, start)

    step = jit_once(_step, apply, tuple(watches.items()), static_argnums=(2,))
    for i, batch in enumerate(itertools.chain(first, batches)):
        found = step(found, *taken_apart((floats, *arguments(batch))))
        check_finite(found, watches, i)
        if on_batch is not None:
            on_batch(i, found)
    check_reached(found, watches, met)
    return _with_scales(tree, watches, found)


def _checkarguments(batches: Any, policy: Any) -> None:
    if is_array(batches) or isinstance(batches, Mapping | str):
        raise TypeError(
            f"calibrate: batches must be an iterable of batches, got one {type(batches).__name__}; "
            f"a single batch is [batch]."
        )
    if policy is not None and not isinstance(policy, Policy | Resolved | str | Method):
        raise TypeError(
            f"calibrate: the policy must be a Policy, a preset name, a resolved policy or a method "
            f"of quantjax.ptq, got {policy!r}."
        )


def _by_method(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    method: Method,
    observer: Observer | None,
    state: Mapping[str, Any] | None,
    on_batch: Callable[[int, dict[str, Any]], Any] | None,
) -> Any:
    """The tree that a method makes, with the static activation scales that it left open."""
    kept = [arguments(batch) for batch in batches]
    if not kept:
        raise ValueError("calibrate: expected at least one batch, got none: nothing to fit to.")
    journal = journal_of(state, on_batch, method, params, kept)
    tree = method(Run(apply, kept, params, params, journal)).tree

    def waits(x: Any) -> bool:
        act = x.act if isinstance(x, QTensor) else None
        return act is not None and act.static and x.act_scale is None

    leaves, structure = jax.tree.flatten(tree, is_leaf=is_qtensor)
    if not any(map(waits, leaves)):
        return tree
    bare = [x if waits(x) else _without_activations(x) for x in leaves]
    found = calibrate(apply, jax.tree.unflatten(structure, bare), kept, observer=observer)
    scaled = jax.tree.leaves(found, is_leaf=is_qtensor)
    pairs = zip(leaves, scaled, strict=True)
    return jax.tree.unflatten(structure, [y if waits(x) else x for x, y in pairs])


def _without_activations(tree: Any) -> Any:
    """The tree as it multiplies float activations."""

    def one(x: Any) -> Any:
        if not isinstance(x, QTensor):
            return x
        return dataclasses.replace(
            x, act=None, act_scale=None, act_zero_point=None, act_thresholds=None
        )

    return jax.tree.map(one, tree, is_leaf=is_qtensor)


def _static(path: str, act: QuantSpec, observer: Observer | None) -> QuantSpec:
    if is_learned(act.format):
        raise ValueError(f"{path}: {act.format} has levels of its own for each activation.")
    if observer is None:
        observer = act.observer if act.static else OBSERVER
    return dataclasses.replace(act, block=Granularity.TENSOR, static=True, observer=observer)


def _quantized(
    params: Any, policy: Any, sites: Sequence[Site], observer: Observer | None
) -> tuple[Any, set[str]]:
    """The quantized tree, its activation specs static, and the paths of those that were asked for
    by more than a policy's `otherwise`."""
    by_name: set[str] = set()
    if policy is None:
        named, structure = named_leaves(params)
        leaves = []
        for path, x in named:
            if isinstance(x, QTensor) and x.act is not None:
                x = dataclasses.replace(x, act=_static(path, x.act, observer))
                by_name.add(path)
            leaves.append(x)
        tree = jax.tree.unflatten(structure, leaves)
    else:
        catch_all = None
        if isinstance(policy, Resolved):
            resolved = policy.resolve(params)
        else:
            policy = preset(policy) if isinstance(policy, str) else policy
            resolved, catch_all = policy.resolve(params, sites), policy.otherwise_name
        decisions = []
        for path, decision in resolved.leaves:
            spec = decision.spec
            if spec is not None and spec.act is not None:
                spec = dataclasses.replace(spec, act=_static(path, spec.act, observer))
                decision = dataclasses.replace(decision, spec=spec)
                if decision.matched != catch_all:
                    by_name.add(path)
            decisions.append((path, decision))
        tree = quantize(params, Resolved(tuple(decisions)))
    if not _watches(tree):
        raise ValueError(
            "calibrate: no parameter asks for quantized activations: give the policy an act, as "
            "'w8a8' and QuantSpec(..., act=QuantSpec(format=IntFormat(8))) do."
        )
    return tree, by_name


def _watches(tree: Any) -> dict[str, Watch]:
    """What is to be observed for the leaves that ask for quantized activations."""
    watches: dict[str, Watch] = {}
    for path, x in named_leaves(tree)[0]:
        if not isinstance(x, QTensor) or x.act is None:
            continue
        if path in watches:
            raise ValueError(f"{path}: two parameters of one name can not be told apart.")
        watches[path] = Watch(x.act, x.shape[: x.ndim - len(x.block)])
    return watches


def _step(
    apply: Callable[..., Any],
    watches: tuple[tuple[str, Watch], ...],
    state: dict[str, State],
    arrays: Sequence[Any],
    frame: Frame,
) -> dict[str, State]:
    """The state after one batch, whose arrays fill the frame."""
    statistics = Statistics(dict(watches), state)
    run(Machine(Record(), statistics=statistics), apply, frame.filled(arrays), {})
    return statistics.state


def _with_scales(tree: Any, watches: dict[str, Watch], state: dict[str, State]) -> Any:
    named, structure = named_leaves(tree)
    leaves = []
    for path, x in named:
        if path in watches:
            found = watches[path].scales(state[path])
            x = dataclasses.replace(x, act_scale=found.scale, act_zero_point=found.zero_point)
        leaves.append(x if path in watches else _without_activations(x))
    return jax.tree.unflatten(structure, leaves)
