"""B batch, L length, V vocabulary."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import UsageError
from bigjax.models.gpt import GPT
from bigjax.models.lstm import LSTM
from bigjax.use.generate import _generate, generate, sample

V, B, L = 11, 3, 4
prompt_BL = jax.random.randint(jax.random.key(0), (B, L), 0, V)
FORMS = {
    "gpt2": {},
    "llama scanned": {"position": "rotary", "norm": "rms", "activation": "swiglu", "kv_heads": 2, "scan": True},
}


def build(**fields):
    model = GPT(vocabulary=V, layers=2, width=16, heads=4, context=12, **fields)
    variables = jax.jit(model.init)(jax.random.key(1), prompt_BL)
    return model, jax.tree.map(lambda x: x * 4, variables)  # far from uniform


def uncached(model, variables, key, length, **how):
    """The whole text again for each token, in a buffer of the final length (what comes later isn't seen)."""
    run, draw = jax.jit(model.apply), jax.jit(lambda logits, k: sample(logits, k, **how))
    tokens_BL = np.pad(prompt_BL, ((0, 0), (0, length)))
    for t in range(length):
        logits_BLV = run(variables, tokens_BL)
        tokens_BL[:, L + t] = draw(logits_BLV[:, L + t - 1], jax.random.fold_in(key, t))
    return tokens_BL


@pytest.mark.parametrize("form", FORMS)
def test_cached_decoding_gives_the_tokens_of_uncached_decoding(form):
    model, variables = build(**FORMS[form])
    key = jax.random.key(5)
    for how in ({"temperature": 0.0}, {"temperature": 0.8, "top_k": 6, "top_p": 0.9}):
        ours = generate(model, variables, prompt_BL, length=8, key=key, **how)
        chex.assert_shape(ours, (B, L + 8))
        np.testing.assert_array_equal(ours, uncached(model, variables, key, 8, **how))
    np.testing.assert_array_equal(ours[:, :L], prompt_BL)
    other = generate(model, variables, prompt_BL, length=8, key=jax.random.key(6), **how)
    assert (other != ours).any()


def test_compiled_once_for_all_keys_temperatures_and_stop_tokens():
    model, variables = build()
    _generate.clear_cache()
    for n in range(3):
        how = {"temperature": 0.5 + n, "top_p": 0.3 * (n + 1), "stop": n}
        generate(model, variables, prompt_BL, length=5, key=jax.random.key(n), **how)
    assert _generate._cache_size() == 1


def test_no_prompts_give_no_texts():
    model, variables = build()
    none = generate(model, variables, prompt_BL[:0], length=5, key=jax.random.key(0), top_k=3, top_p=0.9)
    assert none.shape == (0, L + 5) and none.dtype == jnp.int32


def test_a_stop_token_ends_its_row_only():
    model, variables = build()
    how = {"length": 8, "key": jax.random.key(3), "temperature": 1.0}
    free = np.asarray(generate(model, variables, prompt_BL, **how))
    stop = int(free[0, L + 2])
    expected = free.copy()
    for row in expected:
        at = np.flatnonzero(row[L:] == stop)
        if at.size:
            row[L + at[0] :] = stop
    assert (expected != free).any() and (expected[:, -1] != stop).any()  # one row stops, another doesn't
    np.testing.assert_array_equal(generate(model, variables, prompt_BL, stop=stop, **how), expected)


def draws(logits, count=4000, **how):
    return np.asarray(sample(jnp.tile(jnp.asarray(logits)[None], (count, 1)), jax.random.key(0), **how))


def test_sample_follows_temperature_top_k_and_top_p():
    p = np.array([0.5, 0.25, 0.15, 0.1])
    logits = np.log(p)
    np.testing.assert_allclose(np.bincount(draws(logits), minlength=4) / 4000, p, atol=0.03)
    hot = p**0.5 / (p**0.5).sum()
    np.testing.assert_allclose(np.bincount(draws(logits, temperature=2.0), minlength=4) / 4000, hot, atol=0.03)
    assert set(draws(logits, temperature=0)) == {0}
    assert set(draws(logits[::-1].copy(), top_k=2)) == {2, 3}
    assert set(draws(logits, top_k=9)) == {0, 1, 2, 3}
    assert set(draws(logits, top_p=0.1)) == {0}
    assert set(draws(logits[::-1].copy(), top_p=0.7)) == {2, 3}
    assert set(draws(logits, top_p=0.8)) == {0, 1, 2}
    assert set(draws(logits, top_p=1.0)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"length": 9}, "prompt \\(4\\) and length \\(9\\) exceed the model's context \\(12\\)"),
        ({"length": 0}, "ask for at least 1 token"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"top_p": 1.5}, "top_p in \\(0, 1\\]"),
        ({"top_k": 0}, "top_k at least 1"),
        ({"prompt_BL": jnp.zeros((2, 0), jnp.int32)}, "at least one token"),
        ({"model": LSTM()}, "LSTM has no decode method"),
    ],
)
def test_mistakes_are_named(how, says):
    arguments = {"model": GPT(vocabulary=V, context=12), "prompt_BL": prompt_BL, "length": 3} | how
    with pytest.raises(UsageError, match=says):
        generate(arguments.pop("model"), {}, arguments.pop("prompt_BL"), key=jax.random.key(0), **arguments)
