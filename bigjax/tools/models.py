"""docs/models.md, the table of all models: made of their docstrings, fields and shapes.

    python -m bigjax.tools.models > docs/models.md

A model joins by the `TINY` of its file. Its docstring's example, `model = ...` and `model.init(...)`, says which
configuration is counted; without one it is that of the parent class, or the model's `TINY`.
"""

import ast
import dataclasses
import inspect
import re
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigjax import models

TINY = ("TINY", "TINY_INPUTS")
HEAD = """# Models

Made by `python -m bigjax.tools.models > docs/models.md` from the models themselves. Every model is its Linen module:
`init`, `apply`, float32 parameters, `dtype="bfloat16"` to compute in that; `train=True` turns dropout on (give
`rngs={"dropout": key}`) and moves the statistics of BatchNorm (`mutable="batch_stats"`). Shapes and parameters are
those of the example of each model.
"""


def example(kind: type[nn.Module]) -> tuple[str, nn.Module, tuple[Any, ...]]:
    """(how the model is made, the model, its inputs), as its docstring's example has them."""
    parent = next((k for k in kind.__mro__ if "model.init(" in (k.__doc__ or "")), None)
    if parent is None:
        file = sys.modules[kind.__module__]
        tiny, inputs = (getattr(file, n) if isinstance(getattr(file, n), dict) else {"": getattr(file, n)} for n in TINY)
        name, model = next((k, v) for k, v in tiny.items() if type(v) is kind)
        return f"a tiny {kind.__name__}", model, inputs.get(name, inputs.get(""))
    code = (re.search(rf"^ +{of} = (.*)$", parent.__doc__, re.M)[1] for of in ("model", "variables"))
    made, init = (ast.parse(text, mode="eval").body for text in code)
    made.func.id = kind.__name__
    names = {"jax": jax, "jnp": jnp, kind.__name__: kind}
    given = [eval(ast.unparse(a), names) for a in init.args[1:]]
    return ast.unparse(made), eval(ast.unparse(made), names), tuple(given)


def shape(tree: Any) -> str:
    """`float32 (1, 28, 28, 1)`; of several arrays each."""
    return ", ".join(f"{leaf.dtype} {leaf.shape}" for leaf in jax.tree.leaves(tree))


def facts(kind: type[nn.Module]) -> tuple[str, str, str, str]:
    """(how it is made, shapes of its inputs, of its outputs, number of parameters) of a model's example."""
    made, model, inputs = example(kind)
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    outputs = jax.eval_shape(model.apply, variables, *inputs)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return made, shape(inputs), shape(outputs), f"{count:,}"


def fields(kind: type[nn.Module]) -> str:
    """`features=(32, 64, 64)`, `outputs=10`, ..."""
    own = [f for f in dataclasses.fields(kind) if f.name not in ("parent", "name")]
    return ", ".join(f"`{f.name}`" if f.default is dataclasses.MISSING else f"`{f.name}={f.default!r}`" for f in own)


def page() -> str:
    """docs/models.md."""
    kinds = [getattr(models, name) for name in models.__all__]
    lines = [HEAD, "| model | from | to | parameters | papers |", "|---|---|---|---|---|"]
    parts = []
    for kind in kinds:
        doc = inspect.cleandoc(kind.__dict__.get("__doc__") or "")
        made, inputs, outputs, count = facts(kind)
        named = {f.name for f in dataclasses.fields(kind)}
        about = (sys.modules[kind.__module__].__doc__ or "") + doc
        papers = " ".join("; ".join(re.findall(r"\(([^()]*\d{4})\)", about)).split()).split("; ")
        link = f"[{kind.__name__}](#{kind.__name__.lower()})"
        lines.append(f"| {link} | {inputs} | {outputs} | {count}: `{made}` | {'; '.join(dict.fromkeys(papers))} |")
        call = re.sub(r"\bself, |\b(\w+\.)+(?=[A-Z])", "", str(inspect.signature(kind.__call__)))
        file = kind.__module__.replace(".", "/") + ".py"
        doc = re.sub(r"^(?=(\w+)(, \w+)*: )", lambda m: "* " if m[1] in named else "", doc, flags=re.M)
        doc = doc.replace("\nSown:", "\n\nSown:")
        parts += ["", f"## {kind.__name__}", "", f"[{file}](../{file}): `{call}`", "", doc]
        parts += ["", f"Fields: {fields(kind)}."]
    return "\n".join(lines + parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
