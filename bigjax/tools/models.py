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

HEAD = """# Models

Made by `python -m bigjax.tools.models > docs/models.md` from the models themselves. Every model is its Linen module:
`init`, `apply`, float32 parameters, `dtype="bfloat16"` to compute in that; `train=True` turns dropout on (give
`rngs={"dropout": key}`) and moves the statistics of BatchNorm (`mutable="batch_stats"`). Shapes and parameters are
those of the example of each model.
"""


def tiny(kind: type[nn.Module]) -> tuple[nn.Module, tuple[Any, ...]]:
    """(the model, its inputs) that stand at the end of its file."""
    file = sys.modules[kind.__module__]
    all_of_it = file.TINY if isinstance(file.TINY, dict) else {"": file.TINY}
    name, model = next((name, model) for name, model in all_of_it.items() if type(model) is kind)
    return model, file.TINY_INPUTS[name] if isinstance(file.TINY_INPUTS, dict) else file.TINY_INPUTS


def example(kind: type[nn.Module]) -> tuple[str, nn.Module, tuple[Any, ...]]:
    """(how the model is made, the model, its inputs), as its docstring's example has them."""
    parent = next((k for k in kind.__mro__ if "model.init(" in (k.__doc__ or "")), None)
    if parent is None:
        return "TINY", *tiny(kind)
    code = (re.search(rf"^ +{of} = (.*)$", parent.__doc__, re.M)[1] for of in ("model", "variables"))
    made, init = (ast.parse(text, mode="eval").body for text in code)
    made.func.id = kind.__name__
    names = {"jax": jax, "jnp": jnp, kind.__name__: kind}
    model, *inputs = (eval(ast.unparse(node), names) for node in (made, *init.args[1:]))
    return ast.unparse(made), model, tuple(inputs)


def shape(tree: Any) -> str:
    """`float32 (1, 28, 28, 1)`; of several arrays each."""
    return ", ".join(f"{leaf.dtype} {leaf.shape}" for leaf in jax.tree.leaves(tree))


def facts(kind: type[nn.Module]) -> tuple[str, str, str, str]:
    """(how it is made, shapes of its inputs, of its outputs, number of parameters) of a model's example."""
    made, model, inputs = example(kind)
    outputs, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), *inputs)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return made, shape(inputs), shape(outputs), f"{count:,}"


def fields(kind: type[nn.Module]) -> str:
    """`features=(32, 64, 64)`, `outputs=10`, ..."""
    own = [f for f in dataclasses.fields(kind) if f.name not in ("parent", "name")]
    return ", ".join(f"`{f.name}`" if f.default is dataclasses.MISSING else f"`{f.name}={f.default!r}`" for f in own)


def papers(text: str) -> str:
    """`LeCun et al. 1998; Krizhevsky et al. 2012`, what a text has in brackets."""
    found = re.findall(r"\(([^()]*[a-z.]\s\d{4})\)", text)
    return "; ".join(dict.fromkeys(" ".join("; ".join(found).split()).split("; ")))


def section(kind: type[nn.Module]) -> list[str]:
    """What the page says of one model."""
    call = re.sub(r"\bself, |\b(\w+\.)+(?=[A-Z])", "", str(inspect.signature(kind.__call__)))
    file, named = kind.__module__.replace(".", "/") + ".py", {f.name for f in dataclasses.fields(kind)}
    doc = inspect.cleandoc(kind.__doc__).replace("\nSown:", "\n\nSown:")
    doc = re.sub(r"^(?=(\w+)(, \w+)*: )", lambda m: "* " if m[1] in named else "", doc, flags=re.M)
    head = ["", f"## {kind.__name__}", "", f"[{file}](../{file}): `{call}`"]
    return [*head, "", doc, "", f"Fields: {fields(kind)}."]


def page() -> str:
    """docs/models.md."""
    kinds = [getattr(models, name) for name in models.__all__]
    lines = [HEAD, "| model | from | to | parameters | papers |", "|---|---|---|---|---|"]
    for kind in kinds:
        made, inputs, outputs, count = facts(kind)
        told = papers((sys.modules[kind.__module__].__doc__ or "") + kind.__doc__)
        name = f"[{kind.__name__}](#{kind.__name__.lower()})"
        lines.append(f"| {name} | {inputs} | {outputs} | {count}: `{made}` | {told} |")
    return "\n".join(lines + [line for kind in kinds for line in section(kind)]) + "\n"


if __name__ == "__main__":
    print(page(), end="")
