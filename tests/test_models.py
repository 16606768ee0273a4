"""What must hold of every model. A new one joins by the `TINY` of its file, and by nothing else.

The golden files show in a diff what a change does to parameter trees: BIGJAX_UPDATE_GOLDEN=1 writes them anew.
"""

import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY
from flax import linen as nn
from strict import no_silent_transfer

from bigjax import models
from bigjax.models import CNN, MLP, VAE, Autoencoder, ConvAutoencoder, Discriminator, Generator

GOLD = Path(__file__).parent / "golden"


def example(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Numbers for an input: floats in [0, 1), or the integers 0, 1, 2 in turn."""
    if jnp.issubdtype(shape.dtype, jnp.integer):
        return (jnp.arange(np.prod(shape.shape)) % 3).astype(shape.dtype).reshape(shape.shape)
    return jax.random.uniform(jax.random.key(0), shape.shape, shape.dtype)


def tiny() -> dict[str, tuple[nn.Module, tuple[jax.Array, ...]]]:
    """name: (model, its inputs with the batch axis first), of each file that has a TINY."""
    found = {}
    for file in sorted(Path(models.__path__[0]).glob("[a-z]*.py")):
        module = importlib.import_module(f"bigjax.models.{file.stem}")
        instances, inputs = (getattr(module, n, {}) for n in ("TINY", "TINY_INPUTS"))
        instances = instances if isinstance(instances, dict) else {file.stem: instances}
        for name, model in instances.items():
            shapes = inputs[name] if isinstance(inputs, dict) else inputs
            found[name] = (model, tuple(example(s) for s in shapes))
    return found


TINY = tiny()
GOLDEN = {  # the classic listings at full size; LSTM and GPT have theirs in their own tests
    "mlp": (MLP(), (28, 28, 1)),
    "cnn": (CNN(), (28, 28, 1)),
    "generator": (Generator((32, 32, 3)), (100,)),
    "discriminator": (Discriminator(), (28, 28, 1)),
    "autoencoder": (Autoencoder(), (28, 28, 1)),
    "conv_autoencoder": (ConvAutoencoder(), (28, 28, 1)),
    "vae": (VAE(), (28, 28, 1)),
}
everyone = pytest.mark.parametrize("name", TINY)


@cache
def made(name: str):
    """(model, its first variables, its inputs), made once."""
    model, inputs = TINY[name]
    return model, jax.jit(model.init)(jax.random.key(1), *inputs), inputs


def random_fields(model: nn.Module) -> list[str]:
    return [name for name in ("dropout", "stochastic_depth") if hasattr(model, name)]


def train(model, variables, inputs, key=None):
    """The output in training, without what it does to its state."""
    rngs = {"dropout": jax.random.key(2) if key is None else key, "sample": jax.random.key(3)}
    return model.apply(variables, *inputs, train=True, rngs=rngs, mutable="batch_stats")[0]


@everyone
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gives_float32_from_float32_parameters(name, dtype):
    model, inputs = TINY[name]
    model = model.clone(dtype=dtype)

    def results(key):
        variables = model.init(key, *inputs)
        return variables, (model.apply(variables, *inputs), train(model, variables, inputs))

    variables, outputs = jax.eval_shape(results, jax.random.key(1))
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, outputs))} == {jnp.dtype("float32")}
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(outputs))


@everyone
def test_bfloat16_is_used_and_near(name):
    model, variables, inputs = made(name)
    exact, near = (jax.jit(model.clone(dtype=d).apply)(variables, *inputs) for d in ("float32", "bfloat16"))
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(near), strict=True):
        chex.assert_tree_all_finite(b)
        assert 0 < np.abs(a - b).max() < 0.1 * max(1.0, np.abs(a).max())


@everyone
def test_jit_and_vmap_give_what_a_plain_call_gives(name):
    model, variables, inputs = made(name)
    plain = model.apply(variables, *inputs)
    chex.assert_trees_all_close(jax.jit(model.apply)(variables, *inputs), plain, rtol=1e-5, atol=1e-6)

    def one(*example):  # the batch axis of vmap outside, one of length 1 inside
        return jax.tree.map(lambda y: y[0], model.apply(variables, *(x[None] for x in example)))

    chex.assert_trees_all_close(jax.jit(jax.vmap(one))(*inputs), plain, rtol=1e-4, atol=1e-5)


@everyone
def test_gradients_reach_every_parameter(name):
    model, variables, inputs = made(name)
    model = model.clone(**dict.fromkeys(random_fields(model), 0.0))
    state = {k: v for k, v in variables.items() if k != "params"}

    def loss(params):
        outputs = train(model, {"params": params, **state}, inputs)
        phases = [jnp.arange(y.size, dtype=y.dtype).reshape(y.shape) for y in jax.tree.leaves(outputs)]
        return sum(jnp.sin(y + p).sum() for y, p in zip(jax.tree.leaves(outputs), phases, strict=True))

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    for path, g in flax.traverse_util.flatten_dict(gradients, sep="/").items():
        chex.assert_tree_all_finite(g)
        assert np.abs(g).max() > 0, path


@everyone
def test_is_pure_and_random_only_in_training(name):
    """What it is traced to twice is the same, not only what one program gives twice."""
    model, variables, inputs = made(name)
    chex.assert_trees_all_equal(
        *(jax.jit(partial(model.apply, **t))(variables, *inputs) for t in ({}, {"train": False}))
    )
    once, again = (jax.jit(lambda v, key: train(model, v, inputs, key)) for _ in range(2))
    chex.assert_trees_all_equal(*(f(variables, jax.random.key(2)) for f in (once, again)))
    if random_fields(model):
        a, b = (jax.tree.leaves(once(variables, jax.random.key(k))) for k in (5, 6))
        assert any(not np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@everyone
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_empty_batch_gives_an_empty_result_and_no_transfer_is_silent(name, dtype):
    model, variables, inputs = made(name)
    model = model.clone(dtype=dtype)
    none = [x[:0] for x in inputs]
    with no_silent_transfer():
        some, nothing = (jax.jit(model.apply)(variables, *x) for x in (inputs, none))
        jax.jit(jax.grad(lambda v: sum(y.sum() for y in jax.tree.leaves(model.apply(v, *none)))))(variables)
    for a, b in zip(jax.tree.leaves(some), jax.tree.leaves(nothing), strict=True):
        assert (b.shape, b.dtype) == ((0, *a.shape[1:]), a.dtype)


@everyone
def test_train_is_keyword_only_and_off(name):
    parameter = inspect.signature(type(TINY[name][0]).__call__).parameters["train"]
    assert parameter.kind is parameter.KEYWORD_ONLY and parameter.default is False


@everyone
def test_features_are_sown_when_asked_for(name):
    model, variables, inputs = made(name)

    def sown(**asked):
        return jax.eval_shape(lambda v: model.apply(v, *inputs, **asked)[1], variables)

    state = sown(mutable="intermediates")
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(state))
    assert isinstance(model, Generator) or "features" in state["intermediates"]
    state = sown(capture_intermediates=True, mutable="intermediates")
    assert "__call__" in state["intermediates"]
    assert "intermediates" not in variables


def assert_golden(tree: dict, file: Path) -> None:
    """That the file has the tree's paths, shapes and dtypes."""
    leaves = flax.traverse_util.flatten_dict(tree, sep="/")
    text = "".join(f"{path} {leaf.shape} {leaf.dtype}\n" for path, leaf in sorted(leaves.items()))
    if os.environ.get("BIGJAX_UPDATE_GOLDEN"):
        file.write_text(text)
    assert file.exists() and file.read_text() == text, "BIGJAX_UPDATE_GOLDEN=1 writes it: look at its diff"


@everyone
def test_tree_is_the_golden_one(name):
    model, inputs = TINY[name]
    assert_golden(jax.eval_shape(model.init, jax.random.key(0), *inputs), GOLD / "tiny" / f"{name}.txt")


@pytest.mark.parametrize("name", GOLDEN)
def test_classic_tree_is_the_golden_one(name):
    model, shape = GOLDEN[name]
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    assert_golden(variables["params"], GOLD / f"{name}.txt")


def test_every_file_but_the_shared_pieces_has_a_tiny_of_each_of_its_models():
    listed = {f"{type(model).__module__}.{type(model).__qualname__}" for model, _ in TINY.values()}
    assert {f"{getattr(models, n).__module__}.{n}" for n in dir(models)} == listed
    files = {p.stem for p in Path(models.__path__[0]).glob("[a-z]*.py")}
    assert files - {name.split(".")[2] for name in listed} == {
        "adapt",
        "apart",
        "cache",
        "decoder",
        "layers",
        "transformer",
    }
    assert models.__all__ == dir(models)
    with pytest.raises(AttributeError, match="no attribute 'Block': a model is what the TINY of its file calls"):
        _ = models.Block


NEW = """
import flax.linen as nn
import jax

class Part(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, dtype=self.dtype, name="dense")(x)

class Foo(nn.Module):
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, *, train=False):
        x = Part(self.dtype, name="part")(x)
        self.sow("intermediates", "features", x)
        return x.astype("float32")

TINY = Foo()
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 4), "float32"),)
"""


def test_a_new_file_is_found_and_joins_these_tests(tmp_path):
    for folder in ("bigjax", "tests"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "mutants"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    (tmp_path / "bigjax" / "models" / "foo.py").write_text(NEW)

    def run(*command: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "BIGJAX_UPDATE_GOLDEN": "1"}
        environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    found = run("-c", "from bigjax import models; from bigjax.models import Foo; print(*dir(models), Foo.__module__)")
    assert found.split() == [*sorted({*dir(models), "Foo"}), "bigjax.models.foo"]
    done = run("-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-v", "tests/test_models.py", "-k", "foo")
    assert int(re.search(r"(\d+) passed", done)[1]) >= 9, done
    assert (tmp_path / "tests/golden/tiny/foo.txt").read_text().startswith("params/part/dense/bias (3,) float32")


def test_importing_models_stays_light():
    heavy = ("tensorflow_datasets", "grain", "orbax.checkpoint", "matplotlib")
    names = ", ".join(dir(models))
    code = f"from bigjax.models import {names}; import sys; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
