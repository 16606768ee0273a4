"""Several texts in a row: none sees another, and the loss is that of each by itself.

B batch, L positions.
"""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigjax import UsageError
from bigjax.data import packing
from bigjax.models import GPT, Gemma
from bigjax.models.decoder import restarting
from bigjax.task import Fields
from bigjax.tasks import next_token

SIZE = {"vocabulary": 23, "layers": 2, "width": 16, "heads": 4, "context": 12}
MODELS = {
    "gpt2": GPT(**SIZE | {"layers": 1}),
    "llama": GPT(**SIZE, kv_heads=2, position="rotary", norm="rms", bias=False, window=3, scan=True, remat="full"),
    "gemma": Gemma(**SIZE | {"layers": 3, "kv_heads": 2, "head": 4, "mlp": 24}, window=3, period=2),
}


def documents(*lengths: int) -> list[packing.Document]:
    random = np.random.default_rng(0)
    return [(random.integers(1, 23, n).astype(np.int32), np.arange(n) % 3 != 0) for n in lengths]


def numbered(split: dict[str, np.ndarray]) -> Fields:
    rows = len(split["tokens"])
    return Fields({**split, "index": np.arange(rows, dtype=np.int32), "mask": np.ones(rows, np.float32)})


def loss_of(model: Any, params: Any, split: dict[str, np.ndarray]) -> tuple[jax.Array, jax.Array]:
    """(sum, count) of the loss."""
    return next_token(model).losses["model"](params, {"model": {}}, numbered(split), jax.random.key(0))[0]


@pytest.mark.parametrize("name", ["gpt2", "llama", pytest.param("gemma", marks=pytest.mark.slow)])
def test_loss_and_gradient_are_those_of_each_text_by_itself(name: str) -> None:
    """Alone a text is a row at position 0, in the model as it always was."""
    model, texts = MODELS[name], documents(7, 5, 9, 3, 2, 4)
    packed = packing.pack(texts, length=12)
    assert len(packed["tokens"]) == 3 and packing.padding_share(packed) == 9 / 39
    alone = {"tokens": np.zeros((6, 13), np.int32), "weight": np.zeros((6, 13), bool)}
    for n, (tokens, counts) in enumerate(texts):
        alone["tokens"][n, : len(tokens)], alone["weight"][n, 1 : len(tokens)] = tokens, counts[1:]
    params, _ = next_token(model).init(jax.random.key(1), numbered(alone))

    sums = jax.jit(jax.value_and_grad(partial(loss_of, model), has_aux=True))
    (apart, count), apart_grads = sums(params, alone)
    (together, same), grads = sums(params, packed)
    assert int(count) == int(same) == sum(int(counts[1:].sum()) for _, counts in texts)
    np.testing.assert_allclose(together, apart, rtol=1e-5)
    chex.assert_trees_all_close(grads, apart_grads, rtol=1e-4, atol=1e-5)


def test_positions_begin_again_with_each_text() -> None:
    segments_BL = jnp.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 3, 3]])
    np.testing.assert_array_equal(restarting(segments_BL), [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 2, 3]])


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40), length=st.integers(4, 12))
def test_every_target_is_in_one_row_once(lengths: list[int], length: int) -> None:
    """And no row is without one; the same documents give the same rows."""
    texts = [piece for text in documents(*lengths) for piece in packing.pieces(text, length=length)]
    wanted = sum(int(counts[1:].sum()) for _, counts in documents(*lengths))
    if not wanted:
        with pytest.raises(UsageError, match="no document has a token to learn: give texts of at least two tokens"):
            packing.pack(texts, length=length)
        return
    packed = packing.pack(texts, length=length)
    chex.assert_trees_all_equal(packed, packing.pack(texts, length=length))
    assert packed["weight"].sum() == wanted and packed["weight"].any(1).all()
    found = []
    for row in range(len(packed["tokens"])):
        for segment in range(1, packed["segments"][row].max() + 1):
            here = packed["segments"][row] == segment
            found.append(packed["tokens"][row][here].tolist())
            assert not packed["weight"][row][here][0]
    assert sorted(found) == sorted(tokens.tolist() for tokens, _ in texts)


def test_long_texts_go_on_in_other_pieces() -> None:
    text = packing.of_text(range(10))
    assert [tokens.tolist() for tokens, _ in packing.pieces(text, length=4)] == [
        [0, 1, 2, 3, 4],
        [4, 5, 6, 7, 8],
        [8, 9],
    ]
    with pytest.raises(UsageError, match="a document has 10 tokens, rows have 5: cut it by `pieces`"):
        packing.pack([text], length=4)
