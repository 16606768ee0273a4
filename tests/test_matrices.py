"""What Muon and LAMB take for a matrix: each layer of a scanned stack by itself, as if it were unrolled.

L layers, D width of a residual stream.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigjax import optim
from bigjax.models import CNN, GPT, LSTM
from bigjax.ops import optimizers

LAYERS = 3
GPT2 = {"vocabulary": 11, "layers": LAYERS, "width": 8, "heads": 2, "context": 6, "mlp": 12}
LLAMA = GPT2 | {"position": "rotary", "norm": "rms", "activation": "swiglu", "tied": False, "bias": False}
KERNELS = {f"attention/{k}/kernel" for k in "qkvo"} | {"mlp/up/kernel", "mlp/down/kernel"}
FORMS = {  # name: (fields, the matrices of a block, its other leaves, leaves outside the blocks)
    "gpt2": (
        GPT2,
        KERNELS,
        {f"attention/{k}/bias" for k in "qkvo"}
        | {"mlp/up/bias", "mlp/down/bias"}
        | {f"{n}_norm/{k}" for n in ("attention", "mlp") for k in ("scale", "bias")},
        {"embedding/embedding", "positions/embedding", "norm/scale", "norm/bias"},
    ),
    "llama": (
        LLAMA,
        KERNELS | {"mlp/gate/kernel"},
        {"attention_norm/scale", "mlp_norm/scale"},
        {"embedding/embedding", "norm/scale", "unembedding/kernel"},
    ),
}

pytestmark = pytest.mark.usefixtures("optax_alone")
forms = pytest.mark.parametrize("form", FORMS)


def random(shapes: Any, *, seed: int) -> Any:
    """Values of unequal size, leaf by leaf and, where there is a leading axis, along it too."""
    generator = np.random.default_rng(seed)
    size = lambda shape: 10.0 ** generator.uniform(-2, 1, (*shape[:1], *[1] * (len(shape) - 1)))  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(size(x.shape) * generator.normal(size=x.shape), jnp.float32), shapes)


def scanned(form: str, *, seed: int = 0) -> Any:
    model = GPT(**FORMS[form][0], scan=True)
    return random(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 4), jnp.int32))["params"], seed=seed)


def unrolled(tree: Any) -> Any:
    """The same values as the unrolled model has them: layer_0, layer_1, … for `layers`."""
    rest = {k: v for k, v in tree.items() if k != "layers"}
    return rest | {f"layer_{i}": jax.tree.map(lambda x: x[i], tree["layers"]) for i in range(LAYERS)}  # noqa: B023


def stacked(tree: Any) -> Any:
    layers = [tree[f"layer_{i}"] for i in range(LAYERS)]
    rest = {k: v for k, v in tree.items() if not k.startswith("layer_")}
    return rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def listed(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
    return {optim.path_string(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def test_the_unrolled_tree_of_these_tests_is_the_models() -> None:
    for form, (fields, *_) in FORMS.items():
        model = GPT(**fields, scan=False)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 4), jnp.int32))["params"]
        chex.assert_trees_all_equal_shapes(unrolled(scanned(form)), shapes)


def leaf(x: Any) -> bool:
    return x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)


@forms
def test_muons_matrices_are_exactly_the_kernels_of_the_blocks(form: str) -> None:
    _, inside, beside, outside = FORMS[form]
    number = optax.contrib.MuonDimensionNumbers
    expected = {f"layers/{k}": number((1,), (2,)) for k in inside}
    expected |= dict.fromkeys([f"layers/{k}" for k in beside] + [*outside])
    assert listed(optimizers.matrices(scanned(form)), leaf) == expected
    expected = {f"layer_{i}/{k}": number((0,), (1,)) for k in inside for i in range(LAYERS)}
    expected |= dict.fromkeys([f"layer_{i}/{k}" for k in beside for i in range(LAYERS)] + [*outside])
    assert listed(optimizers.matrices(unrolled(scanned(form))), leaf) == expected


def test_of_other_families_kernels_of_any_rank_but_not_the_outputs() -> None:
    number = optax.contrib.MuonDimensionNumbers
    shapes = jax.eval_shape(
        CNN(features=(4,), dense=(5,), pools=1, batch_norm=True).init, jax.random.key(0), jnp.zeros((1, 6, 6, 1))
    )
    found = {k: v for k, v in listed(optimizers.matrices(shapes["params"]), leaf).items() if v}
    assert found == {"conv_0/kernel": number((0, 1, 2), (3,)), "dense_0/kernel": number((0,), (1,))}
    shapes = jax.eval_shape(LSTM(hidden=(4,)).init, jax.random.key(0), jnp.zeros((1, 6, 3)))
    assert not any(listed(optimizers.matrices(shapes["params"]), leaf).values())  # Adam's: gates are no one matrix


@forms
def test_optax_gives_muon_what_is_listed_and_adam_the_rest(form: str) -> None:
    params = scanned(form)
    state = optimizers.muon(0.1, adam_rate=0.01).init(params)
    shapes = {}
    for kind in ("muon", "adam"):
        held = jax.tree.leaves(state.inner_states[kind], is_leaf=lambda s: hasattr(s, "mu"))
        (moments,) = (s.mu for s in held if hasattr(s, "mu"))
        shapes[kind] = {k: x.shape for k, x in listed(moments).items()}
    everything = {k: x.shape for k, x in listed(params).items()}
    wanted = {k for k, v in listed(optimizers.matrices(params), leaf).items() if v}
    assert shapes == {
        "muon": {k: v for k, v in everything.items() if k in wanted},
        "adam": {k: v for k, v in everything.items() if k not in wanted},
    }


def updates(tx: optax.GradientTransformation, params: Any, gradients: list[Any]) -> Any:
    """The last update after several gradients, of parameters that move."""
    state, one = tx.init(params), jax.jit(tx.update)
    for gradient in gradients:
        update, state = one(gradient, state, params)
        params = optax.apply_updates(params, update)
    return update


OPTIMIZERS = {
    "muon": optimizers.muon(0.02, adam_rate=0.003, weight_decay=0.1),
    "lamb": optimizers.lamb(0.02, weight_decay=0.1),
    "lars": optimizers.lars(0.2, weight_decay=0.1),
}


@forms
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scanned_stack_is_updated_as_its_layers_by_themselves(name: str, form: str) -> None:
    params, gradients = scanned(form), [scanned(form, seed=i) for i in (1, 2, 3)]
    together = updates(OPTIMIZERS[name], params, gradients)
    apart = updates(OPTIMIZERS[name], unrolled(params), [unrolled(g) for g in gradients])
    chex.assert_trees_all_close(together, stacked(apart), rtol=2e-3, atol=1e-6)


def test_muon_makes_every_layers_update_orthogonal_however_unequal_the_gradients() -> None:
    """All singular values near 1; were a stack one matrix, the layer of the largest gradient would be nearly all."""
    params, gradient = scanned("gpt2"), scanned("gpt2", seed=1)
    sizes_L = jnp.array([1e-3, 1.0, 1e2])
    gradient["layers"] = jax.tree.map(lambda g: g * sizes_L.reshape(-1, *[1] * (g.ndim - 1)), gradient["layers"])
    update = updates(optimizers.muon(1.0, adam_rate=0.0), params, [gradient])
    for path, u in listed(update).items():
        if path.removeprefix("layers/") in KERNELS:
            _, inputs, outputs = u.shape
            values = np.linalg.svd(np.asarray(u), compute_uv=False) / np.sqrt(max(1, outputs / inputs))
            assert values.shape == (LAYERS, min(inputs, outputs))
            assert 0.3 < values[:, 0].min() and values.max() < 1.3, path
            np.testing.assert_allclose(np.median(values), 1, atol=0.3)


def test_adam_has_its_own_rate_beside_muon() -> None:
    params, gradient = scanned("gpt2"), scanned("gpt2", seed=1)
    update = listed(updates(optimizers.muon(0.0, adam_rate=0.01), params, [gradient]))
    first = 0.01 * (0.9 * 0.1 / (1 - 0.9**2) + 1)  # rate × sign, and Nesterov's look ahead (Dozat 2016)
    for path, u in update.items():
        if path.removeprefix("layers/") in KERNELS:
            assert not np.asarray(u).any()
        else:
            np.testing.assert_allclose(np.abs(u), first, rtol=1e-3, err_msg=path)


@forms
def test_lambs_trust_ratios_are_one_a_leaf_or_a_layer(form: str) -> None:
    """The list of what LAMB takes for one block of weights: all leaves, the scanned ones layer by layer."""
    params, update = scanned(form), scanned(form, seed=1)
    out, _ = optimizers.trust_ratios().update(update, optax.EmptyState(), params)
    ratios = {}
    for (k, u), g in zip(listed(out).items(), listed(update).values(), strict=True):
        ratio = np.sort((np.asarray(u) / np.asarray(g)).ravel())
        ratios[k] = 1 + int((np.diff(ratio) > 1e-3 * ratio[1:]).sum())  # distinct up to rounding
    _, inside, beside, outside = FORMS[form]
    assert ratios == {f"layers/{k}": LAYERS for k in inside | beside} | dict.fromkeys(outside, 1)
    for path, u in listed(out).items():
        p = np.asarray(listed(params)[path])
        axes = tuple(range(int(path.startswith("layers/")), p.ndim))
        np.testing.assert_allclose(*(np.sqrt(np.square(x).sum(axes)) for x in (np.asarray(u), p)), rtol=1e-4)


def test_a_trust_ratio_of_nothing_is_1() -> None:
    params = {"layers": {"scale": jnp.array([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])}, "still": jnp.ones(2)}
    update = {"layers": {"scale": jnp.array([[2.0, 1.0], [0.0, 2.0], [0.0, 0.0]])}, "still": jnp.zeros(2)}
    out, _ = optimizers.trust_ratios().update(update, optax.EmptyState(), params)
    expected = {"layers": {"scale": [[2.0, 1.0], [0.0, 5.0], [0.0, 0.0]]}, "still": [0.0, 0.0]}
    chex.assert_trees_all_close(out, jax.tree.map(jnp.array, expected, is_leaf=lambda x: isinstance(x, list)))


def test_lamb_of_unstacked_parameters_is_optaxs() -> None:
    params, gradients = unrolled(scanned("gpt2")), [unrolled(scanned("gpt2", seed=i)) for i in (1, 2, 3)]
    theirs = optax.lamb(0.02, weight_decay=0.1, mask=optim.mask(optim.NO_DECAY, matching=False))
    ours = updates(OPTIMIZERS["lamb"], params, gradients)
    chex.assert_trees_all_close(ours, updates(theirs, params, gradients), rtol=1e-4, atol=1e-8)
