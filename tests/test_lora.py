"""Adapters and frozen parameters: what changes, what is computed, and what is kept.

B batch, L positions.
"""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import run_with_devices, tiny_experiment
from test_user_files import said_by

import bigjax
from bigjax import UsageError, pretrained, train
from bigjax.experiment import Experiment, RunConfig
from bigjax.models import BERT, CNN, GPT, T5, Mixtral
from bigjax.models.adapt import ADAPTER, Adapted
from bigjax.optim import path_string
from bigjax.pretrained import adapters, begin
from bigjax.pretrained.names import flat
from bigjax.step import TrainState, init_state, train_step
from bigjax.tasks import classify, next_token

PLAIN = GPT(vocabulary=17, layers=2, width=16, heads=2, context=8)
STACK = PLAIN.clone(scan=True, remat="full")
LLAMA = GPT(
    vocabulary=17, layers=2, width=16, heads=2, kv_heads=1, context=8, position="rotary", norm="rms", bias=False,
    activation="swiglu", mlp=24, tied=False,
)  # fmt: skip
ROWS = np.random.default_rng(0).integers(0, 17, (32, 9)).astype(np.int32)
ALL = r"/(q|k|v|o|up|gate|down)/kernel$"
VARIANTS = {
    "full": (PLAIN, None),
    "adapters": (Adapted(PLAIN, on="attention/(q|v)/kernel", rank=2), r"attention/(q|v)/lora_[ab]$"),
    "some": (Adapted(PLAIN, train=r"layer_1/mlp|^norm/"), r"layer_1/mlp|^norm/"),
    "both": (Adapted(STACK, on=ALL, rank=2, train="bias$"), r"lora_[ab]$|bias$"),
    "embedding": (Adapted(PLAIN, on="embedding/embedding|/up/", rank=2), r"lora_[ab]$"),
}


def batch(rows: int = 8) -> dict[str, Any]:
    index = np.arange(rows, dtype=np.int32)
    return {"tokens": ROWS[:rows], "index": index, "mask": np.ones(rows, np.float32)}


def begun(model: Any, tx: optax.GradientTransformation) -> tuple[Any, TrainState, Any]:
    """(the compiled step, the state before it, the key)."""
    task, key = next_token(model), jax.random.key(0)
    state = jax.jit(partial(init_state, task=task, tx={"model": tx}, ema=0.0))(key, batch())
    return jax.jit(partial(train_step, task=task, tx={"model": tx})), state, key


def leaves(state: TrainState) -> dict[str, np.ndarray]:
    """All parameters, trained and frozen, by their path in the model."""
    frozen = state.model_state["model"].get("frozen", {})
    return {k: np.asarray(x) for k, x in {**flat(state.params["model"]), **flat(frozen)}.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_only_what_is_named_changes(name: str) -> None:
    """Bit for bit; all of that does, the loss falls, and nothing else has optimizer state."""
    model, named = VARIANTS[name]
    step, state, key = begun(model, optax.adam(1e-2))
    before, losses = leaves(state), []
    moments = {path_string(p).partition("/mu/")[2] for p, _ in jax.tree.leaves_with_path(state.opt_state)} - {""}
    for _ in range(8):
        state, metrics = step(state, batch(), key)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    after = leaves(state)
    assert losses[-1] < losses[0] - 1e-3
    changed = {k for k in before if not np.array_equal(before[k], after[k])}
    wanted = {k for k in before if re.search(named or "", k)}
    still = {k for k in wanted if k.endswith("k/bias")}  # a key's bias has no gradient but rounding
    assert wanted - still <= changed <= wanted and moments == wanted


def test_no_gradient_of_what_is_frozen_is_computed() -> None:
    """By the compiled program: of a full step's products a third are gradients of kernels, another of activations."""
    wide = GPT(vocabulary=32, layers=1, width=128, heads=2, context=8)

    def flops(model: Any) -> float:
        step, state, key = begun(model, optax.sgd(1e-2))
        return step.lower(state, batch(), key).compile().cost_analysis()["flops"]

    full, lora = flops(wide), flops(Adapted(wide, on=ALL, rank=1))
    assert lora < 0.8 * full
    assert flops(Adapted(wide, train="^norm/")) < 0.5 * full


def randomized(variables: Any) -> Any:
    """The same with adapters that do something."""

    def one(path: Any, x: Any) -> Any:
        return jnp.full(x.shape, 0.03, x.dtype) if path_string(path).endswith("lora_b") else x

    return jax.tree_util.tree_map_with_path(one, variables)


OTHERS = (
    (BERT(vocabulary=17, layers=1, width=8, heads=2, context=8), ((2, 6),), ALL),
    (T5(vocabulary=17, layers=1, width=8, heads=2, mlp=12), ((2, 6), (2, 5)), ALL),
    (
        Mixtral(vocabulary=17, layers=1, width=8, heads=2, kv_heads=1, mlp=12, experts=2, chosen=1, context=8),
        ((2, 6),),
        "attention/q/kernel|experts",
    ),
)


@pytest.mark.parametrize(
    ("model", "inputs", "on"),
    [
        (STACK, ((2, 6),), ALL + "|embedding$"),
        (LLAMA, ((2, 6),), ALL + "|unembedding"),
        *(pytest.param(*given, marks=pytest.mark.slow) for given in OTHERS),
    ],
)
def test_a_model_begins_as_it_was_and_is_merged_as_it_is(model: Any, inputs: Any, on: str) -> None:
    """Frozen are all parameters that it has without adapters, whatever holds the matrix."""
    adapted, tokens = Adapted(model, on=on, rank=2), [jnp.asarray(ROWS[: s[0], : s[1]]) for s in inputs]
    variables = jax.jit(adapted.init)(jax.random.key(0), *tokens)
    plain, shapes = variables["frozen"], jax.eval_shape(model.init, jax.random.key(0), *tokens)["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(plain, shapes)
    assert all(ADAPTER.search(where) for where in flat(variables["params"]))
    apply, before = jax.jit(adapted.apply), jax.jit(model.apply)({"params": plain}, *tokens)
    np.testing.assert_array_equal(apply(variables, *tokens), before)
    variables = randomized(variables)
    after = apply(variables, *tokens)
    assert np.abs(after - before).max() > 1e-3
    inner, merged = adapted.merged(variables)
    assert inner == model
    np.testing.assert_allclose(jax.jit(model.apply)(merged, *tokens), after, atol=2e-5)


def test_the_model_is_otherwise_as_it_was() -> None:
    """Its fields and methods; what is carried of a pass; bfloat16; and it can be decoded."""
    from bigjax.use.generate import generate

    adapted = Adapted(PLAIN.clone(dtype="bfloat16"), on="attention/q/kernel", rank=2)
    assert (adapted.context, adapted.heads, hasattr(adapted, "decode"), hasattr(adapted, "nothing")) == (8, 2, 1, 0)
    variables = randomized(jax.jit(adapted.init)(jax.random.key(0), ROWS[:2, :4]))
    out, state = adapted.apply(variables, ROWS[:2, :4], mutable=["frozen", "intermediates"])
    assert out.dtype == jnp.float32 and set(state) == {"frozen", "intermediates"}
    chex.assert_trees_all_equal(state["frozen"], variables["frozen"])
    made = generate(adapted, variables, jnp.asarray(ROWS[:2, :3]), length=2, key=jax.random.key(1), temperature=0.0)
    assert made.tokens_RN[0, 0] == out[0, 2].argmax()
    pictures = Adapted(CNN(outputs=3), train="logits|dense")
    shapes = jax.eval_shape(pictures.init, jax.random.key(0), jnp.zeros((1, 20, 20, 1)))
    assert shapes["params"].keys() == {"dense_0", "logits"}


def test_mistakes() -> None:
    def init(**fields: Any) -> str:
        return said_by(jax.eval_shape, Adapted(PLAIN, **fields).init, jax.random.key(0), ROWS[:1, :4])

    there = "embedding/embedding, layer_N/attention/k/kernel, layer_N/attention/o/kernel"
    assert init(on="attn").startswith(f"no matrix matches 'attn' for an adapter: there are {there}")
    assert "bias" not in init(on="attn")
    assert init(train="attn").startswith("no parameter matches train 'attn': there are embedding/embedding, layer_N/")
    assert init(on="bias$").startswith("no matrix matches 'bias$' for an adapter")
    assert init() == "nothing of this model would be trained: say what by `train`, or by `on` for adapters"
    assert init(on="(").startswith("'(' is no regular expression (")
    pictures = Adapted(CNN(outputs=3), on="conv_0/kernel")
    image = jnp.zeros((1, 20, 20, 1))
    said = said_by(jax.eval_shape, pictures.init, jax.random.key(0), image)
    assert said == "conv_0/kernel (3, 3, 1, 32), which 'conv_0/kernel' matches, is no matrix: match other ones"
    with pytest.raises(UsageError, match="an Adapted model is no part of another"):
        pictures(image)


def test_flags() -> None:
    assert adapters.Adapt()(PLAIN) is PLAIN
    lora = adapters.Adapt(lora_rank=4, lora_alpha=8.0)(PLAIN)
    assert (lora.rank, lora.alpha, lora.on, lora.train) == (4, 8.0, adapters.MATRICES, None)
    some = adapters.Adapt(train="norm")(PLAIN)
    assert (some.on, some.train) == (None, "norm")


# ---- runs


def experiment(model: Any, **changes: Any) -> Experiment:
    tokens = {"train": {"tokens": ROWS}, "test": {"tokens": ROWS[:6]}}
    return tiny_experiment(**{"task": next_token(model), "tx": optax.adam(1e-2), **tokens} | changes)


def fit(home: Path, given: Experiment, **flags: Any) -> train.Run:
    flags = {"steps": 4, "batch_size": 8, "log_every": 2, "save_every": 2, "eval_every": 4} | flags
    return train.fit(given, RunConfig(workdir=str(home), **flags), quiet=True)


@pytest.mark.slow
def test_a_run_of_adapters(tmp_path: Path) -> None:
    """It begins with the parameters of a run of all of the model, frozen ones too; is loaded; and begins one again."""
    first = fit(tmp_path / "full", experiment(PLAIN))
    model = Adapted(PLAIN, on="attention/q/kernel", rank=2)
    run = fit(tmp_path / "lora", experiment(model), init_from=str(tmp_path / "full"), ema=0.5)
    chex.assert_trees_all_equal(run.state.model_state["model"]["frozen"], first.state.params["model"])
    assert run.result["parameters"] == first.result["parameters"] + run.result["trained_parameters"]
    assert "trained_parameters" not in first.result
    loaded, variables = bigjax.load(tmp_path / "lora")
    assert loaded == model
    chex.assert_trees_all_equal(variables["params"], run.state.ema["model"]["params"])
    start = experiment(PLAIN, tx=optax.sgd(0.0))
    back = fit(tmp_path / "still", start, init_from=str(tmp_path / "lora"), steps=1)
    chex.assert_trees_all_equal(back.state.params["model"], first.state.params["model"])


def folder_of(path: Path, model: Any, *, seed: int = 0) -> Path:
    pretrained.save(path, model, jax.jit(model.init)(jax.random.key(seed), ROWS[:1, :4]))
    return path


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_adapters_are_saved_alone_and_loaded_onto_their_base(scan: bool, tmp_path: Path) -> None:
    """Which a run begins with, and no other; merged they are a folder for others."""
    folder, other = folder_of(tmp_path / "base", LLAMA), folder_of(tmp_path / "other", LLAMA, seed=1)
    given = begin.weights(folder)
    model = Adapted(given.model.clone(scan=scan), on="attention/q/kernel", rank=1)
    run = fit(tmp_path / "run", experiment(model, initial=given))
    base, _ = pretrained.load(folder, scan=scan), None
    chex.assert_trees_all_equal(run.state.model_state["model"]["frozen"], base[1]["params"])
    adapters.save(tmp_path / "adapters", run.model, run.variables)
    loaded, variables = adapters.load(tmp_path / "adapters", folder)
    assert loaded == model
    chex.assert_trees_all_equal(variables, run.variables)
    chex.assert_trees_all_equal(adapters.load(tmp_path / "adapters", base)[1], run.variables)
    about = json.loads((tmp_path / "adapters" / "adapter.json").read_text())
    said = said_by(adapters.load, tmp_path / "adapters", other)
    assert said.startswith(
        f"the adapters in {tmp_path / 'adapters'} belong to a GPT with the hash {about['base'][:12]}"
    )
    assert f", and {other} has " in said and said.endswith(": give the base that they were trained on")
    assert "holds no adapter.json and adapter.safetensors" in said_by(adapters.load, folder, folder)
    assert "a GPT has no adapters" in said_by(adapters.save, tmp_path / "x", base[0], base[1])
    pretrained.save(tmp_path / "merged", *run.model.merged(run.variables))
    whole, merged = pretrained.load(tmp_path / "merged", scan=scan)
    tokens = ROWS[:2, :6]
    np.testing.assert_allclose(
        jax.jit(whole.apply)(merged, tokens), jax.jit(run.model.apply)(run.variables, tokens), atol=1e-5
    )


def test_the_hash_is_of_the_layers_however_they_are_kept(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "base", LLAMA)
    apart, stacked = (pretrained.load(folder, scan=scan)[1]["params"] for scan in (False, True))
    assert adapters.base_hash(apart) == adapters.base_hash(stacked)


def test_adapters_of_a_real_size_are_small() -> None:
    """SmolLM2-135M's shapes, rank 8 beside all matrices of its layers."""
    model = GPT(
        vocabulary=49152, layers=30, width=576, heads=9, kv_heads=3, mlp=1536, position="rotary", norm="rms",
        activation="swiglu", bias=False, scan=True,
    )  # fmt: skip
    shapes = jax.eval_shape(adapters.Adapt(lora_rank=8)(model).init, jax.random.key(0), jnp.zeros((1, 4), "int32"))
    small, large = (sum(x.size for x in jax.tree.leaves(shapes[k])) for k in ("params", "frozen"))
    assert large == 134_515_008 and small / large < 0.02


def test_a_new_head_is_not_frozen(tmp_path: Path) -> None:
    model = BERT(vocabulary=17, layers=1, width=8, heads=2, context=8)
    folder = folder_of(tmp_path / "bert", model)
    given = begin.weights(folder)
    head = given.model.clone(head="sequence", pooler=True, outputs=3)
    rows = {"tokens": ROWS[:, :8], "label": np.arange(32, dtype=np.int32) % 3}

    def state(model: Any) -> Any:
        task = classify(model, classes=3, inputs=lambda batch: (batch["tokens"],))
        shown = {**batch(2), "label": rows["label"][:2], "tokens": rows["tokens"][:2]}
        init = partial(init_state, task=task, tx={"model": optax.sgd(1.0)}, ema=0.0)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(init, jax.random.key(0), shown))

    lora = Adapted(head, on="attention/q/kernel")
    said = said_by(given, state(lora))
    assert said.endswith("would be new, and frozen as it is: train it too, --train 'logits'")
    taken, said = given(state(dataclasses.replace(lora, train="logits")))
    assert "as initialized: params/logits" in said and "lora" not in said
    assert np.abs(taken.model_state["model"]["frozen"]["embedding"]["embedding"]).max() > 0


def on_eight_devices() -> None:
    """Of adapters beside every matrix: a step on 2 × 2 × 2 devices is one device's, each part where it is to be."""
    from bigjax.program import Program
    from bigjax.sharding import MeshConfig, make_mesh

    model = STACK.clone(width=32, vocabulary=18)
    given = experiment(Adapted(model, on=ALL, rank=4, train="embedding"), tx=optax.sgd(0.1))
    results = []
    for config, devices in ((MeshConfig(data=2, fsdp=2, tensor=2), 8), (MeshConfig(), 1)):
        mesh = make_mesh(config, batch_size=8, devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            program = Program(given, RunConfig(batch_size=8), given.train, steps=2, mesh=mesh)
            state, window = program.initialize(program.key), program.fresh_window()
            with program.batches(0) as batches:
                for _ in range(2):
                    state, window, _ = program.update(state, window, next(batches), program.key, program.controls())
            shards = {k: x.sharding.spec for k, x in flat(state.params["model"]).items()}
            results.append(jax.tree.map(np.asarray, state))
        if devices == 8:
            assert shards["layers/attention/q/lora_b"][-1] == "tensor", shards
            assert shards["layers/mlp/down/lora_a"][-2] == "tensor", shards
            frozen = flat(state.model_state["model"]["frozen"])
            assert frozen["layers/attention/q/kernel"].sharding.spec[-1] == "tensor"
    chex.assert_trees_all_close(results[0].params, results[1].params, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(results[0].model_state, results[1].model_state)


@pytest.mark.slow
def test_on_a_mesh(tmp_path: Path) -> None:
    run_with_devices("import test_lora; test_lora.on_eight_devices()", folder=tmp_path)
