"""B prompts, L length, R rows, N new tokens, V vocabulary."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_with_devices

from bigjax import UsageError, sharding
from bigjax.models import CNN, GPT, LSTM, T5, Autoencoder, Gemma, Mixtral
from bigjax.use import generate as module
from bigjax.use.draws import sample
from bigjax.use.generate import generate

V, B, L = 11, 3, 4
prompt_BL = jax.random.randint(jax.random.key(0), (B, L), 1, V)
LENGTHS = np.array([3, 1, 4], np.int32)
ROTARY = {"position": "rotary", "norm": "rms", "activation": "swiglu", "kv_heads": 2}
SHAPE = {"vocabulary": V, "width": 8, "heads": 2, "kv_heads": 1, "mlp": 12, "context": 12}
MODELS = {
    "gpt2": GPT(vocabulary=V, layers=2, width=16, heads=4, context=12),
    "llama scanned": GPT(vocabulary=V, layers=2, width=16, heads=4, context=12, scan=True, **ROTARY),
    "mistral": GPT(vocabulary=V, layers=2, width=16, heads=4, context=12, window=3, **ROTARY),
    "gemma": Gemma(**SHAPE, layers=3, head=6, window=2, period=3, rope_factor=2.0),
    "mixtral": Mixtral(**SHAPE, layers=2, experts=3, window=3),
}
READS = {
    "t5": T5(vocabulary=V, layers=2, decoder_layers=1, width=8, heads=2, head=3, mlp=12, buckets=4, distance=6),
    "t5 scanned": T5(vocabulary=V, layers=2, width=8, heads=2, head=3, mlp=12, buckets=4, distance=6, scan=True),
}
every = pytest.mark.parametrize("name", [*MODELS, *READS])


@functools.cache
def build(name="gpt2"):
    """Far from uniform."""
    model = (MODELS | READS)[name]
    inputs = (prompt_BL, prompt_BL) if name in READS else (prompt_BL,)
    shapes, random = jax.eval_shape(model.init, jax.random.key(1), *inputs), np.random.default_rng(2)
    return model, jax.tree.map(lambda x: jnp.asarray(0.5 * random.normal(size=x.shape), x.dtype), shapes)


def logits_of(model, variables, prompt, *, steps):
    """A function of what is written, (R, up to steps) -> (R, V), for one prompt, without a cache, padding or mask."""
    run = jax.jit(model.apply)

    def next_of(written):
        rows = np.asarray(written, np.int32).reshape(len(written), -1)
        many, count = np.repeat(np.asarray(prompt)[None], len(rows), axis=0), rows.shape[1]
        later = np.pad(rows, ((0, 0), (0, steps - count)))
        if hasattr(model, "encode"):
            first = np.zeros((len(rows), 1), np.int32)
            return np.asarray(run(variables, many, np.concatenate([first, later], axis=1)))[:, count]
        return np.asarray(run(variables, np.concatenate([many, later], axis=1)))[:, len(prompt) + count - 1]

    return next_of


def greedy(model, variables, prompt, *, steps):
    """(tokens, their log-probabilities) of one row."""
    next_of, tokens, gains = logits_of(model, variables, prompt, steps=steps), [], []
    for _ in range(steps):
        logits = next_of([tokens])[0]
        tokens.append(int(logits.argmax()))
        gains.append(float(jax.nn.log_softmax(logits).max()))
    return tokens, gains


@every
def test_cached_decoding_gives_the_tokens_of_uncached_decoding(name):
    """Of rows of different lengths as of each alone, whatever the padding holds."""
    model, variables = build(name)
    alone = [greedy(model, variables, row[:n], steps=8) for row, n in zip(np.asarray(prompt_BL), LENGTHS)]
    padding = np.arange(L)[None] >= LENGTHS[:, None]
    for filled in (0, 7):
        prompts = np.where(padding, filled, prompt_BL)
        got = generate(model, variables, prompts, length=8, length_B=LENGTHS, temperature=0)
        np.testing.assert_array_equal(got.tokens_RN, [tokens for tokens, _ in alone])
        np.testing.assert_allclose(got.score_R, [sum(gains) for _, gains in alone], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(got.length_R, [8] * B)
    one = generate(model, variables, prompt_BL[2:], length=8, temperature=0)
    np.testing.assert_array_equal(one.tokens_RN[0], alone[2][0])


def test_a_rows_draws_are_its_own():
    model, variables = build()
    how = {"length": 8, "key": jax.random.key(5), "temperature": 0.8, "top_k": 6, "top_p": 0.9}
    whole = generate(model, variables, prompt_BL, **how)
    next_of, tokens = logits_of(model, variables, prompt_BL[0], steps=8), []
    draw = jax.jit(functools.partial(sample, temperature=0.8, top_k=6, top_p=0.9))
    for t in range(8):
        key = jax.random.fold_in(how["key"], t)
        tokens.append(int(draw(jnp.asarray(next_of([tokens])), key)[0]))
    np.testing.assert_array_equal(whole.tokens_RN[0], tokens)
    others = generate(model, variables, prompt_BL.at[1:].add(-1), **how)
    np.testing.assert_array_equal(others.tokens_RN[0], tokens)
    again = generate(model, variables, prompt_BL, **how | {"key": jax.random.key(6)})
    assert (again.tokens_RN != whole.tokens_RN).any()
    several = np.asarray(generate(model, variables, prompt_BL[:1], returned=4, **how).tokens_RN)
    assert len({tuple(row) for row in several}) > 1


def test_other_lengths_temperatures_shares_penalties_and_stop_tokens_compile_nothing():
    model, variables = build()
    programs = (module._read, module._first, module._loop)
    [program.clear_cache() for program in programs]
    for n in range(3):
        how = {"temperature": 0.5 + n, "top_p": 0.3 * (n + 1), "min_p": 0.1 * n, "repetition_penalty": 1.5 + n}
        prompt = prompt_BL[:, : n + 2]
        generate(model, variables, prompt, length=5, key=jax.random.key(n), stop=(n, n + 3), **how)
    assert [program._cache_size() for program in programs] == [1, 1, 1]


def test_no_prompts_give_no_texts():
    none = generate(*build(), prompt_BL[:0], length=5, key=jax.random.key(0), top_k=3, top_p=0.9)
    assert none.tokens_RN.shape == (0, 5) and none.tokens_RN.dtype == jnp.int32 and none.score_R.shape == (0,)


def test_a_stop_token_ends_its_row_only():
    how = {"length": 8, "key": jax.random.key(3)}
    free = np.asarray(generate(*build(), prompt_BL, **how).tokens_RN)
    stop = (int(free[0, 2]), int(free[1, 4]))
    expected, lengths = free.copy(), np.full(B, 8)
    for n, row in enumerate(expected):
        at = np.flatnonzero(np.isin(row, stop))
        if at.size:
            lengths[n], row[at[0] + 1 :] = at[0] + 1, stop[0]
    assert len(set(lengths)) > 1
    got = generate(*build(), prompt_BL, stop=stop, **how)
    np.testing.assert_array_equal(got.tokens_RN, expected)
    np.testing.assert_array_equal(got.length_R, lengths)
    shorter = [generate(*build(), prompt_BL, **how | {"length": int(n)}) for n in lengths]
    np.testing.assert_allclose(got.score_R, [x.score_R[n] for n, x in enumerate(shorter)], rtol=1e-5)


# ---- draws


def changed(logits, had, *, temperature=1.0, top_k=None, top_p=None, min_p=0.0, repetition_penalty=1.0):
    """Probabilities by the definitions, one token after the other. had: the tokens before."""
    scores = [
        (x / repetition_penalty if x > 0 else x * repetition_penalty) if token in had else x
        for token, x in enumerate(map(float, logits))
    ]
    p = np.exp(np.array(scores) / temperature)
    order = np.argsort(-p)
    p[order[top_k or V :]] = 0
    p, kept, mass = p / p.sum(), [], 0.0
    for token in order:
        if mass < (top_p or 1.0) and p[token] >= min_p * p.max():
            kept.append(token)
        mass += p[token]
    out = np.zeros(V)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"repetition_penalty": 1.8},
        {"temperature": 1.5, "top_k": 7, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 0.7},
    ],
    ids=lambda how: "_".join(how) or "plain",
)
def test_draws_have_the_distribution_that_is_claimed(how):
    """Of two tokens, each pair: by a chi-square test at 0.1 %, and what has no probability never occurs."""
    model, variables = build()
    count, prompt = 4000, np.asarray(prompt_BL[0])
    next_of = logits_of(model, variables, prompt, steps=2)
    first, second = next_of([[]])[0], next_of([[token] for token in range(V)])
    p = changed(first, set(prompt), **how)[:, None]
    p = p * np.stack([changed(row, {*prompt, token}, **how) for token, row in enumerate(second)])
    got = generate(model, variables, prompt[None], length=2, key=jax.random.key(7), returned=count, **how).tokens_RN
    seen = np.bincount(np.asarray(got) @ [V, 1], minlength=V * V)
    expected = count * p.reshape(-1)
    assert not seen[expected == 0].any()
    often = expected >= 5
    seen, expected = (np.append(x[often], x[~often].sum()) for x in (seen, expected))
    degrees = often.sum()
    assert degrees >= 4
    score = ((seen - expected) ** 2 / np.maximum(expected, 1)).sum()
    assert score < degrees + 3.1 * np.sqrt(2 * degrees) + 5  # the 99.9 % point, a little above it


def draws(logits, count=4000, **how):
    return np.asarray(sample(jnp.tile(jnp.asarray(logits)[None], (count, 1)), jax.random.key(0), **how))


def test_sample_follows_temperature_top_k_top_p_and_min_p():
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1]))
    assert set(draws(logits, temperature=0)) == {0}
    assert set(draws(logits[::-1].copy(), top_k=2)) == {2, 3}
    assert set(draws(logits, top_k=9)) == {0, 1, 2, 3}
    assert set(draws(logits, top_p=0.1)) == {0}
    assert set(draws(logits[::-1].copy(), top_p=0.7)) == {2, 3}
    assert set(draws(logits, top_p=0.8)) == {0, 1, 2}
    assert set(draws(logits, top_p=1.0)) == {0, 1, 2, 3}
    assert set(draws(logits, top_k=2, top_p=0.6)) == {0}
    assert set(draws(logits, min_p=0.29)) == {0, 1, 2}
    assert set(draws(logits, min_p=1.0)) == {0}


# ---- beams


@pytest.mark.parametrize("name", ["gpt2", pytest.param("t5", marks=pytest.mark.slow)])
def test_as_many_beams_as_there_are_texts_find_the_best_of_all(name):
    """Best by score / length ** penalty of all that end with the stop token or are as long as they may be."""
    model, variables = build(name)
    length, stop, penalty = 3, 4, 0.5
    found_short = False
    for row, n in ((2, 4), (0, 3))[: 2 if name == "gpt2" else 1]:
        prompt = np.asarray(prompt_BL)[row, :n]
        next_of, found, open_ = logits_of(model, variables, prompt, steps=length), [], {(): 0.0}
        for t in range(length):
            gains = np.asarray(jax.nn.log_softmax(next_of(list(open_)) if t else next_of([[]])))
            grown = {
                (*text, token): score + gains[i, token]
                for (i, (text, score)), token in itertools.product(enumerate(open_.items()), range(V))
            }
            ended = {text: s for text, s in grown.items() if text[-1] == stop or len(text) == length}
            found += [(s / len(text) ** penalty, text) for text, s in ended.items()]
            open_ = {text: s for text, s in grown.items() if text not in ended}
        best = sorted(found, reverse=True)[:5]
        lengths = LENGTHS if n == 3 else None
        prompts = prompt_BL if n == 3 else prompt_BL[row:]
        how = {"beams": 200, "returned": 5, "length_penalty": penalty, "stop": stop, "length": length}
        got = generate(model, variables, prompts, length_B=lengths, **how)
        np.testing.assert_allclose(got.score_R[:5], [score for score, _ in best], rtol=1e-4)
        for tokens, size, (_, text) in zip(got.tokens_RN, got.length_R, best):
            assert tuple(tokens[:size].tolist()) == text and (tokens[size:] == stop).all()
        found_short |= any(len(text) < length for _, text in best)
    assert found_short


# ---- meshes


def on_a_mesh(file):
    """Runs in a process with 8 devices: the same tokens, and a cache that is split by rows and by heads."""
    model = MODELS["llama scanned"].clone(vocabulary=12)
    shapes, random = jax.eval_shape(model.init, jax.random.key(1), prompt_BL), np.random.default_rng(2)
    variables = jax.tree.map(lambda x: jnp.asarray(0.5 * random.normal(size=x.shape), x.dtype), shapes)
    prompts = jnp.tile(prompt_BL[:1], (4, 1)).at[:, 0].set(jnp.arange(4))
    how = {"length": 8, "length_B": np.array([4, 3, 4, 2], np.int32)}
    ways = ({"temperature": 0}, {"key": jax.random.key(1), "repetition_penalty": 1.2}, {"beams": 2})
    alone = [np.asarray(generate(model, variables, prompts, **how, **way).tokens_RN) for way in ways]
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2), batch_size=4)
    placed = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), variables, sharding.place(variables, mesh))
    with jax.set_mesh(mesh):
        for way, expected in zip(ways, alone):
            np.testing.assert_array_equal(generate(model, placed, prompts, **how, **way).tokens_RN, expected)
        job = module.asked(model, placed, prompts, temperature=0, **how)
        state = module.go_on(job, module.begin(job), 3)
        one = generate(model, placed, prompts[:1], length=3, temperature=0)
        np.testing.assert_array_equal(one.tokens_RN, alone[0][:1, :3])
    shapes = {x.addressable_shards[0].data.shape for x in jax.tree.leaves(state.cache)}
    assert shapes == {(2, 1, 1, 12, 4)}, shapes  # of (layers 2, rows 4, heads 2, positions 12, 4)
    open(file, "w").close()


@pytest.mark.slow
def test_on_a_mesh_the_tokens_are_the_same_and_the_cache_is_split(tmp_path):
    run_with_devices("import test_generate; test_generate.on_a_mesh('done')", folder=tmp_path)
    assert (tmp_path / "done").exists()


# ---- mistakes


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"length": 9}, "a prompt of 4 tokens and length 9 are more than the model's context \\(12\\): shorten one"),
        ({"length": 0}, "length 0: ask for at least 1 token"),
        ({"temperature": -1.0}, "temperature -1.0: give 0, which takes the likeliest, or more"),
        ({"top_p": 1.5}, "top_p 1.5: give a share above 0, up to 1"),
        ({"top_k": 0}, "top_k 0: give at least 1"),
        ({"min_p": 2}, "min_p 2: give a share from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty 0: give more than 0; 1 is none"),
        ({"key": None}, "temperature 1.0 draws tokens: give key=jax.random.key\\(0\\), or temperature=0"),
        ({"beams": 2, "temperature": 0.5}, "2 beams draw nothing, and temperature 0.5 is of draws: leave one of"),
        ({"beams": 2, "top_k": 3}, "2 beams draw nothing, and top_k 3 is of draws"),
        ({"temperature": 0, "top_p": 0.5}, "temperature 0 draws nothing, and top_p 0.5 is of draws: leave one of"),
        ({"beams": 2**30}, "beams of 11 tokens are too many to compare: give fewer"),
        ({"beams": 2, "returned": 3}, "returned 3 of 2 beams: ask for no more than there are"),
        ({"temperature": 0, "returned": 3}, "returned 3 at temperature 0: all would be the same"),
        ({"beams": 0}, "beams 0: give at least 1"),
        ({"length": 3.0}, "length 3.0: give a whole number"),
        ({"top_k": 3.0}, "top_k 3.0: give a whole number"),
        ({"beams": True}, "beams True: give a whole number"),
        ({"temperature": "0.5"}, "temperature '0.5': give a finite number"),
        ({"top_p": np.nan}, "top_p nan: give a finite number"),
        ({"length_penalty": np.inf}, "length_penalty inf: give a finite number"),
        ({"key": 0}, "key 0 is no key: give key=jax.random.key\\(0\\)"),
        ({"key": jax.random.split(jax.random.key(0))}, "is no key: give key=jax.random.key\\(0\\)"),
        ({"stop": "\n"}, "stop '\\\\n' is no token: give whole numbers, or texts as stop_strings of complete"),
        ({"stop": [1, 2.5]}, "stop 2.5 is no token"),
        ({"length_B": [1.5, 2.0, 3.0]}, "length_B says how many tokens are real of 3 prompts with room for 4, not"),
        ({"prompt_BL": jnp.zeros((2, 0), jnp.int32)}, "a prompt is empty: give each at least one token"),
        ({"length_B": np.array([1, 0, 2])}, "a prompt is empty: give each at least one token"),
        ({"length_B": np.array([1, 5, 2])}, "length_B says how many tokens are real of 3 prompts with room for 4, not"),
        ({"prompt_BL": np.array([[3, V]])}, "a prompt holds token 11, and the model's vocabulary is 11: use the token"),
        ({"prompt_BL": np.zeros((1, 2))}, "prompts are rows of integer tokens \\(batch, length\\), not float64"),
        ({"model": LSTM()}, "LSTM writes no text: give a model of the next token \\(GPT, Gemma, Mixtral\\), or T5"),
        ({"model": CNN()}, "CNN writes no text"),
        ({"model": Autoencoder()}, "Autoencoder writes no text"),
    ],
)
def test_mistakes_are_named(how, says):
    asked = {"model": MODELS["gpt2"], "prompt_BL": prompt_BL, "length": 3, "key": jax.random.key(0)} | how
    with pytest.raises(UsageError, match=says):
        generate(asked.pop("model"), {}, asked.pop("prompt_BL"), **asked)


def test_a_long_row_of_which_little_is_real_fits_the_context():
    wide = jnp.pad(prompt_BL, ((0, 0), (0, 20)))
    how = {"length": 8, "temperature": 0}
    chex.assert_trees_all_equal(
        generate(*build(), wide, length_B=np.full(B, L), **how), generate(*build(), prompt_BL, **how)
    )
