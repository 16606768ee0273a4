"""The convolution over words: B batch, L positions, D embedding, F features."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigjax import UsageError
from bigjax.models import TextCNN
from bigjax.ops.optimizers import max_norm

L = 6
MODEL = TextCNN(vocabulary=9, embedding=4, widths=(2, 5), maps=3, outputs=2, dropout=0.0)
TOKENS_BL = np.array([[1, 2, 3, 4, 5, 6], [7, 8, 1, 0, 0, 0], [5, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], np.int32)
LENGTH_B = np.array([6, 3, 1, 0], np.int32)


@pytest.fixture(scope="module")
def variables():
    made = MODEL.init(jax.random.key(0), TOKENS_BL)
    return jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), made)


def features(variables, tokens_BL, length_B) -> np.ndarray:
    return np.asarray(MODEL.clone(outputs=None).apply(variables, tokens_BL, length_B))


def by_hand(params, tokens: np.ndarray) -> np.ndarray:
    """The paper's equations 2 and 3 and its largest value, one filter and one place at a time, in float64."""
    words_LD = np.asarray(params["embedding"]["embedding"], np.float64)[tokens]
    out = []
    for width in MODEL.widths:
        kernel, bias = (np.asarray(params[f"width_{width}"][k], np.float64) for k in ("kernel", "bias"))
        padded = np.concatenate([words_LD, np.zeros((width, 4))])
        for m in range(3):
            values = [(padded[t : t + width] * kernel[..., m]).sum() + bias[m] for t in range(len(tokens))]
            out.append(max([0.0, *values]))
    return np.array(out)


def test_is_the_papers_equations(variables) -> None:
    """Also of rows that are shorter than the widest filter, and of one that is empty."""
    found = features(variables, TOKENS_BL, LENGTH_B)
    for row, length, got in zip(TOKENS_BL, LENGTH_B, found, strict=True):
        np.testing.assert_allclose(got, by_hand(variables["params"], row[:length]), atol=1e-5)
    assert (found[:3] > 0).any(1).all() and not found[3].any()


def test_padding_never_wins(variables) -> None:
    """Nor has it a gradient; whatever the padding holds and however long it is."""
    biased = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 4.0 if path[-1].key == "bias" else x, variables
    )  # the zeros behind a row are above all that is in it
    for given in (variables, biased):
        expected = features(given, TOKENS_BL, LENGTH_B)
        junk = np.where(np.arange(L) < LENGTH_B[:, None], TOKENS_BL, 8)
        np.testing.assert_array_equal(features(given, junk, LENGTH_B), expected)
        long = np.pad(TOKENS_BL, ((0, 0), (0, 7)), constant_values=8)
        np.testing.assert_allclose(features(given, long, LENGTH_B), expected, atol=1e-6)

    def loss(params, tokens_BL):
        return jnp.square(MODEL.apply({"params": params}, tokens_BL, LENGTH_B)).sum()

    junk = np.where(np.arange(L) < LENGTH_B[:, None], np.minimum(TOKENS_BL, 7), 8)
    gradient = jax.grad(loss)(variables["params"], junk)
    assert not np.asarray(gradient["embedding"]["embedding"][8]).any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("fields", "shape", "said"),
    [
        ({"widths": ()}, (2, 4), r"widths \(\) of a TextCNN: give one or more different ones, from 1 up"),
        ({"widths": (3, 3)}, (2, 4), r"widths \(3, 3\)"),
        ({}, (2, 4, 1), r"a TextCNN takes integer tokens \(batch, length\), not int32\[2, 4, 1\]"),
    ],
)
def test_what_is_wrong_is_said(fields, shape, said) -> None:
    with pytest.raises(UsageError, match=said):
        MODEL.clone(**fields).init(jax.random.key(0), jnp.zeros(shape, jnp.int32))


def test_max_norm_pulls_back_what_an_update_makes_too_long(optax_alone) -> None:
    """Of each output's weights; the others, and those that are short, move as they would."""
    params = {"head": {"kernel": jnp.array([[3.0, 0.1], [4.0, 0.2]]), "bias": jnp.array([9.0, 9.0])}}
    tx = optax.chain(optax.sgd(1.0), max_norm(3.0, "head/kernel"))
    gradient = {"head": {"kernel": jnp.array([[-3.0, 0.0], [-4.0, -0.1]]), "bias": jnp.array([-1.0, 0.0])}}
    updates, _ = tx.update(gradient, tx.init(params), params)
    moved = optax.apply_updates(params, updates)["head"]
    np.testing.assert_allclose(moved["kernel"], [[1.8, 0.1], [2.4, 0.3]], atol=1e-6)
    np.testing.assert_allclose(moved["bias"], [10.0, 9.0])
