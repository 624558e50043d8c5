"""Does a policy pick the leaves its patterns say, and explain the rest?"""

import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import quantjax as qj
from quantjax import formats
from quantjax.formats import ExponentFormat, IntFormat, Levels
from quantjax.paths import compile_pattern, nearest, path_name
from quantjax.policy import preset_spec
from quantjax.spec import Granularity, QuantSpec


def shapes(**leaves):
    """A flat tree of float32 leaves, with '.' for '/' in the names."""
    tree: dict = {}
    for name, shape in leaves.items():
        node, (*parents, last) = tree, name.split(".")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


NET = shapes(
    **{
        "conv1.kernel": (3, 3, 8, 16),
        "conv1.bias": (16,),
        "block.0.dense.kernel": (16, 32),
        "block.0.norm.scale": (16,),
        "block.1.dense.kernel": (32, 32),
        "head.kernel": (32, 10),
        "head.bias": (10,),
    }
)


def chosen(policy) -> dict[str, str]:
    """path -> the format of every leaf that is quantized."""
    resolved = policy.resolve(NET)
    return {name: str(r.spec.format) for name, r in resolved.items() if r.spec is not None}


# Patterns.

PATTERNS = [  # pattern, paths that match, paths that do not
    ("kernel", ["kernel"], ["a/kernel", "kernels", "akernel"]),
    ("*/kernel", ["a/kernel", "b/kernel"], ["kernel", "a/b/kernel"]),
    ("**/kernel", ["kernel", "a/kernel", "a/b/c/kernel"], ["a/kernel/b", "a/mykernel"]),
    ("a/**", ["a", "a/b", "a/b/c"], ["b/a", "ab", "ab/c"]),
    ("a/**/z", ["a/z", "a/b/z", "a/b/c/z"], ["a/bz", "z", "a"]),
    ("**", ["a", "a/b", "a/b/c"], []),
    ("**/**", ["a", "a/b"], []),
    ("a/**/**/b/**/**", ["a/b", "a/c/b/c"], ["a", "a/c"]),
    ("**/b/**", ["b", "a/b", "b/c", "a/a/b/c/c"], ["a", "ab", "a/bc/d"]),
    ("block*/w", ["block/w", "block12/w"], ["block/1/w", "xblock/w"]),
    ("a?/w", ["ab/w", "a1/w"], ["a/w", "abc/w"]),
    ("a.b/[x]", ["a.b/[x]"], ["aab/x", "a.b/x"]),  # nothing but * and ? is special
    ("*", ["a", "kernel"], ["a/b"]),
]


@pytest.mark.parametrize("pattern, yes, no", PATTERNS, ids=[r[0] for r in PATTERNS])
def test_patterns_are_anchored_globs(pattern, yes, no):
    regex = compile_pattern(pattern)
    assert [p for p in yes if not regex.fullmatch(p)] == []
    assert [p for p in no if regex.fullmatch(p)] == []


def slow_match(pattern: list[str], path: list[str]) -> bool:
    """The definition by recursion: `**` spans any number of parts, `*` stays within one."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(slow_match(pattern[1:], path[i:]) for i in range(len(path) + 1))
    part = "".join("[^/]*" if c == "*" else re.escape(c) for c in pattern[0])
    return bool(path) and bool(re.fullmatch(part, path[0])) and slow_match(pattern[1:], path[1:])


@settings(max_examples=400)
@given(
    st.lists(st.sampled_from(["a", "b", "*", "**", "a*"]), min_size=1, max_size=5),
    st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=5),
)
def test_patterns_match_the_recursive_definition(pattern, path):
    got = bool(compile_pattern("/".join(pattern)).fullmatch("/".join(path)))
    assert got == slow_match(pattern, path)


@pytest.mark.parametrize("pattern", ["", "/a", "a/", "a//b"])
def test_empty_parts_raise(pattern):
    with pytest.raises(ValueError, match="joined by single"):
        qj.Policy([(pattern, "w8")])


# Rules.


def test_the_first_match_wins_and_none_keeps():
    policy = qj.Policy([("head/kernel", "w8"), ("block/1/**", None), ("**/kernel", "w4")])
    assert chosen(policy) == {
        "head/kernel": "int8",
        "conv1/kernel": "int4",
        "block/0/dense/kernel": "int4",
    }
    resolved = policy.resolve(NET)
    assert resolved["block/1/dense/kernel"].reason == "kept by the policy"
    assert resolved["block/1/dense/kernel"].matched == "block/1/**"
    assert resolved["head/bias"].reason == "no pattern matches"
    swapped = qj.Policy([("**/kernel", "w4"), ("head/kernel", "w8")])
    assert set(chosen(swapped).values()) == {"int4"}  # and the shadowed rule does not raise


def test_otherwise_takes_the_rest_but_spares_what_presets_spare():
    policy = qj.Policy([("head/**", None)], otherwise="w4")
    assert set(chosen(policy)) == {"conv1/kernel", "block/0/dense/kernel", "block/1/dense/kernel"}
    assert "a bias" in policy.resolve(NET)["conv1/bias"].reason
    assert "a scale" in policy.resolve(NET)["block/0/norm/scale"].reason


def test_a_rule_is_taken_at_its_word():
    resolved = qj.Policy([("**/bias", "w8")]).resolve(NET)
    assert resolved["conv1/bias"].spec.block == (None,)  # rank 1: one scale
    grouped = qj.Policy([("**/bias", "w8g4")]).resolve(NET)
    assert grouped["conv1/bias"].spec.block == (4,)


def test_a_pattern_that_matches_nothing_raises_with_the_nearest_names():
    with pytest.raises(ValueError, match="'hed/kernel' matches no parameter.*'head/kernel'"):
        qj.Policy([("hed/kernel", "w8")]).resolve(NET)
    with pytest.raises(ValueError, match="matches no parameter"):  # after a catch-all, too
        qj.Policy([("**", "w8"), ("nowhere/**", None)]).resolve(NET)


def test_rules_that_are_none_raise():
    for rule, message in [
        (("a",), "a rule is a pair"),
        ("ab", "a rule is a pair"),
        ((3, "w8"), "a rule is a pair"),
        (("a", 8), "expected a QuantSpec"),
        (("a", "w12"), "unknown preset"),
    ]:
        with pytest.raises(ValueError, match=message):
            qj.Policy([rule])


def test_policies_are_values():
    rules = [("a", "w8"), ("**", None)]
    assert qj.Policy(rules) == qj.Policy(rules) and hash(qj.Policy(rules)) == hash(qj.Policy(rules))
    assert qj.Policy(rules) != qj.Policy(rules[::-1])


def test_a_resolved_policy_is_explicit_and_holds_for_its_tree():
    resolved = qj.preset("w4g8").resolve(NET)
    assert list(resolved) == [
        "block/0/dense/kernel",
        "block/0/norm/scale",
        "block/1/dense/kernel",
        "conv1/bias",
        "conv1/kernel",
        "head/bias",
        "head/kernel",
    ]
    assert resolved.resolve(NET) is resolved
    assert not isinstance(resolved["head/kernel"].spec.block, Granularity)
    with pytest.raises(KeyError, match="nearest: 'head/kernel'"):
        resolved["head/kernle"]
    with pytest.raises(ValueError, match="another tree"):
        resolved.resolve(shapes(**{"head.kernel": (32, 10)}))


def test_quantized_leaves_raise():
    q = qj.quantize({"a": {"kernel": jnp.ones((4, 4))}}, "w8")
    with pytest.raises(ValueError, match="a/kernel: is quantized already"):
        qj.quantize(q, "w4")
    assert qj.preset("w8").explain(q)["a/kernel"].spec is not None


# Presets.

GRAMMAR = [  # name, bits, group, activation bits, levels
    ("w8", 8, None, None, Levels.NARROW),
    ("w5", 5, None, None, Levels.NARROW),
    ("w4", 4, None, None, Levels.NARROW),
    ("w2", 2, None, None, Levels.HALF),
    ("w1", 1, None, None, Levels.HALF),
    ("w4g64", 4, 64, None, Levels.NARROW),
    ("w8a8", 8, None, 8, Levels.NARROW),
    ("w4g32a8", 4, 32, 8, Levels.NARROW),
    ("w4a8g32", 4, 32, 8, Levels.NARROW),
]


@pytest.mark.parametrize("name, bits, group, act, levels", GRAMMAR, ids=[r[0] for r in GRAMMAR])
def test_preset_grammar(name, bits, group, act, levels):
    spec = preset_spec(name)
    assert spec.format == IntFormat(bits, levels=levels)
    assert spec.group == group and spec.symmetric
    assert (spec.act.format.bits if spec.act else None) == act
    assert spec.observer == (qj.mse() if bits <= 4 else qj.absmax())
    if act:
        assert spec.act.block is Granularity.ROW


def test_named_presets():
    assert preset_spec("fp8").format == formats.e4m3
    assert preset_spec("ternary").format == formats.ternary
    assert preset_spec("binary").format == formats.binary
    for name, fmt in [("mxfp4", formats.e2m1), ("mxfp8", formats.e4m3)]:
        spec = preset_spec(name)
        assert (spec.format, spec.group, spec.scale_format) == (fmt, 32, ExponentFormat())
    spec = preset_spec("nvfp4")
    assert (spec.format, spec.group, spec.scale_format) == (formats.e2m1, 16, formats.e4m3)
    assert (preset_spec("nf4").group, preset_spec("nf4g32").group) == (64, 32)


BAD = [
    "w9",
    "w0",
    "w",
    "8",
    "w4g0",
    "w4g",
    "w8a1",
    "w8a9",
    "w4g32a8g32",
    "W8",
    " w8",
    "w8 ",
    "int4",
]


@pytest.mark.parametrize("name", [*BAD, "w4.5", "nf4g0", "fp4", "w8a8a8", "w44", "g64"])
def test_unknown_presets_raise_with_the_grammar(name):
    with pytest.raises(ValueError, match=re.escape("Presets are w{1..8}[g{group}]")):
        qj.preset(name)


def test_a_group_after_weights_without_activations_is_one_group():
    """'w4g32' has one reading; a trailing group belongs to the activation form alone."""
    assert preset_spec("w4g32") != preset_spec("w4a8g32")
    assert preset_spec("w4g32a8") == preset_spec("w4a8g32")


# Axes.

AXES = [  # name, shape, group, block, words of the remark
    ("kernel", (16, 32), None, (None, 1), ""),
    ("w", (16, 32), None, (None, 1), ""),
    ("weight", (16, 32), None, (1, None), ""),
    ("embedding", (100, 32), None, (1, None), ""),
    ("embeddings", (100, 32), None, (1, None), ""),
    ("kernel", (3, 3, 16, 32), None, (None, None, None, 1), ""),
    ("weight", (32, 16, 3, 3), None, (1, None, None, None), ""),
    ("kernel", (3, 3, 3, 16, 32), None, (None, None, None, None, 1), ""),
    ("kernel", (3, 16, 32), None, (None, None, 1), "mark layers with stacked="),
    ("kernel", (12, 12, 16, 32), None, (None, None, None, 1), "mark layers with stacked="),
    ("query", (16, 32), None, (None, 1), "no known name"),
    ("kernel", (16, 32), 8, (8, 1), ""),
    ("kernel", (16, 32), 64, (16, 1), ""),  # a group no larger than the axis
    ("weight", (16, 32), 8, (1, 8), ""),
    ("embedding", (100, 32), 8, (1, 8), ""),
    # A group counts the weights of one output: inputs first, then the window from its end.
    ("kernel", (3, 3, 16, 32), 8, (1, 1, 8, 1), ""),
    ("kernel", (3, 3, 16, 32), 48, (1, 3, 16, 1), ""),
    ("kernel", (3, 3, 16, 32), 144, (3, 3, 16, 1), ""),
    ("weight", (32, 16, 3, 3), 48, (1, 16, 1, 3), ""),
]


@pytest.mark.parametrize("name, shape, group, block, words", AXES, ids=str)
def test_axes_by_name(name, shape, group, block, words):
    spec = QuantSpec(format=IntFormat(8), group=group)
    resolution = qj.Policy([(name, spec)]).resolve(shapes(**{name: shape}))[name]
    assert resolution.spec.block == block and resolution.spec.group is None
    assert words in resolution.reason and bool(words) == bool(resolution.reason)


def test_stacked_keeps_leading_axes_apart():
    spec = QuantSpec(format=IntFormat(8), stacked=1)
    tree = shapes(**{"kernel": (6, 16, 32)})
    resolution = qj.Policy([("kernel", spec)]).resolve(tree)["kernel"]
    assert resolution.spec.block == (None, 1) and resolution.reason == ""
    tensor = QuantSpec(format=IntFormat(8), block=Granularity.TENSOR, stacked=2)
    assert qj.Policy([("kernel", tensor)]).resolve(tree)["kernel"].spec.block == (None,)
    with pytest.raises(ValueError, match="kernel: stacked=3 leaves no axis"):
        qj.Policy([("kernel", QuantSpec(format=IntFormat(8), stacked=3))]).resolve(tree)


def test_specs_that_do_not_fit_together_raise():
    int8 = IntFormat(8)
    for fields, message in [
        (dict(format="int8"), "format must be"),
        (dict(format=formats.e8m0), "format must be"),
        (dict(format=int8, block=(0,)), "block must be"),
        (dict(format=int8, block=[4, 1]), "block must be"),
        (dict(format=int8, block=(2.5, 1)), "block must be"),
        (dict(format=int8, block=(4, 1), group=4), "either block or group"),
        (dict(format=int8, group=0), "group must be"),
        (dict(format=int8, group=2.5), "group must be"),
        (dict(format=int8, observer=qj.mse), "observer must be"),
        (dict(format=formats.nf4, symmetric=False), "zero point"),
        (dict(format=formats.binary, symmetric=False), "zero point"),
        (dict(format=int8, symmetric=False, scale_format=formats.e4m3), "symmetric"),
        (dict(format=qj.Codebook.learned(3), observer=qj.mse()), "learned codebook"),
        (dict(format=int8, stacked=-1), "stacked"),
    ]:
        with pytest.raises(ValueError, match=message):
            QuantSpec(**fields)


# Names.


def test_names_are_key_paths_without_params_and_box_values():
    keys = jax.tree_util
    a, value = keys.DictKey("a"), keys.GetAttrKey("value")
    for path, name in [
        ((keys.DictKey("params"), a, keys.SequenceKey(3)), "a/3"),
        ((a, value), "a"),
        ((keys.DictKey("params"), a, value), "a"),
        ((keys.DictKey("params"),), "params"),
        ((a, keys.DictKey("params")), "a/params"),
        ((a, keys.DictKey("value")), "a/value"),  # a parameter that is called so
        (
            (keys.GetAttrKey("layers"), keys.SequenceKey(0), keys.GetAttrKey("weight")),
            "layers/0/weight",
        ),
        ((keys.FlattenedIndexKey(1),), "1"),
        ((keys.DictKey("mlp/~/linear_0"), keys.DictKey("w")), "mlp/~/linear_0/w"),
    ]:
        assert path_name(path) == name


def test_nearest_names():
    assert nearest("kernl", ["bias", "kernel"]).startswith("'kernel'")
    assert nearest("x", []) == "none"


def test_collections_beside_params_are_spared():
    tree = {"params": NET, "batch_stats": shapes(**{"norm.kernel": (16, 16)})}
    resolved = qj.preset("w8").resolve(tree)
    assert resolved["batch_stats/norm/kernel"].spec is None
    assert "collection batch_stats" in resolved["batch_stats/norm/kernel"].reason
    assert resolved["head/kernel"].spec is not None
    asked = qj.Policy([("batch_stats/**/kernel", "w8")]).resolve(tree)
    assert asked["batch_stats/norm/kernel"].spec is not None


@pytest.mark.parametrize(
    "leaf, reason",
    [
        (np.ones((4, 4), np.int32), "int32, not a float"),
        (np.ones((4, 4), bool), "bool, not a float"),
        (np.ones((4, 4), np.complex64), "complex64, not a float"),
        (jnp.ones((4, 4), jnp.float8_e4m3fn), "not a float of 16 bits"),
        (np.float32(3.0), "a scalar"),
        (np.ones((0, 4), np.float32), "no elements"),
        (3.5, "not an array"),
        (jax.nn.relu, "not an array"),
        ("text", "not an array"),
    ],
)
def test_leaves_that_can_not_be_quantized_say_why(leaf, reason):
    tree = {"kernel": leaf}
    for policy in (qj.preset("w8"), qj.Policy([("kernel", "w8")])):
        assert reason in policy.resolve(tree)["kernel"].reason
        assert qj.quantize(tree, policy)["kernel"] is leaf
