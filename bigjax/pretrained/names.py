"""Which of their tensors is which of our arrays: tables of names, and the layouts between them.

A row of a table is (their module, ours, kind). `{n}` stands for the number of a layer, `{e}` for that of an expert; a
tuple of ours are those that they keep side by side in one tensor.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import numpy as np

from bigjax import UsageError

Row = tuple[str, str | tuple[str, ...], str]
Index = tuple[slice, ...]

# kind -> of their tensors: (collection, our name, axes of theirs in our order; None for as they are)
SAME: tuple[int, ...] | None = None
KINDS: dict[str, dict[str, tuple[str, str, tuple[int, ...] | None]]] = {
    "linear": {"weight": ("params", "kernel", (1, 0)), "bias": ("params", "bias", SAME)},
    "conv1d": {"weight": ("params", "kernel", SAME), "bias": ("params", "bias", SAME)},  # GPT-2's linear
    "conv": {"weight": ("params", "kernel", (2, 3, 1, 0)), "bias": ("params", "bias", SAME)},
    "norm": {"weight": ("params", "scale", SAME), "bias": ("params", "bias", SAME)},
    "embedding": {"weight": ("params", "embedding", SAME)},
    "batch_norm": {
        "weight": ("params", "scale", SAME),
        "bias": ("params", "bias", SAME),
        "running_mean": ("batch_stats", "mean", SAME),
        "running_var": ("batch_stats", "var", SAME),
    },
    "array": {"": ("params", "", SAME)},  # one tensor, of no module
    "point": {"weight": ("params", "kernel", (1, 0)), "bias": ("params", "bias", SAME)},  # linear, or as a convolution
    "channels": {"": ("params", "", SAME)},  # an array, perhaps with axes of 1 behind
}
MERGED = ("point", "channels")  # the last axes of their tensors may be one of ours


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one of our arrays is: in one tensor of theirs, or each of its layers, or experts, in one (`stack`)."""

    theirs: tuple[str, ...]
    shape: tuple[int, ...]  # of theirs
    axes: tuple[int, ...] | None
    part: int = 0  # which, of so many side by side along our last axis
    parts: int = 1
    stack: tuple[int, ...] = ()  # our leading axes, that theirs fill in order
    merged: bool = False  # the last axes of theirs may be several, which together are the last of `shape`

    def read(self, index: Index, read: Callable[[str, Index], np.ndarray]) -> tuple[tuple[int, ...], list[np.ndarray]]:
        """The part of our array at `index`: the shape of its leading axes that are a stack, and the arrays in it.

        `read` gives a part of a tensor of theirs.
        """
        depth = len(self.stack)
        names = np.array(self.theirs).reshape(self.stack)[index[:depth]]
        return names.shape, [self._one(name, index[depth:], read) for name in names.flat]

    def _one(self, name: str, index: Index, read: Callable[[str, Index], np.ndarray]) -> np.ndarray:
        axes = self.axes or tuple(range(len(index)))
        if self.parts > 1:
            size = self.shape[axes[-1]] // self.parts
            start, stop, _ = index[-1].indices(size)
            index = (*index[:-1], slice(self.part * size + start, self.part * size + stop))
        there = [slice(None)] * len(index)
        for ours, theirs in enumerate(axes):
            there[theirs] = index[ours]
        array = read(name, tuple(there))
        return array if self.axes is None else array.transpose(self.axes)

    def row(self, array: np.ndarray) -> np.ndarray:
        """Our array, or a layer of it, in the layout of theirs."""
        return array if self.axes is None else array.transpose(np.argsort(self.axes))


def shapes_of(model: nn.Module, inputs: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    """The shapes of a model's variables, for which nothing is computed.

    Layers that `nn.scan` can stack are traced once, and told apart here.
    """
    traced = model.clone(scan=True) if hasattr(model, "scan") else model

    def init() -> Any:
        zeros = (jax.numpy.zeros(s.shape, s.dtype) for s in inputs)
        return traced.init(jax.random.key(0), *zeros)

    try:
        shapes = jax.eval_shape(init)
    except (TypeError, ValueError, ArithmeticError, flax.errors.FlaxError) as e:
        said = next(iter(str(e).splitlines()), type(e).__name__)
        raise UsageError(
            f"config.json and these fields make no {type(model).__name__} ({said}): correct them"
        ) from None
    return shapes if traced == model else _unstacked(shapes)


def _unstacked(tree: Any) -> Any:
    """layers/… as layer_0/…, layer_1/…, each without the leading axis."""
    if not isinstance(tree, Mapping):
        return tree
    found = {k: _unstacked(v) for k, v in tree.items() if k != "layers"}
    stacked = jax.tree.leaves(tree.get("layers"))
    for n in range(stacked[0].shape[0] if stacked else 0):
        found[f"layer_{n}"] = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), tree["layers"])
    return found


def flat(tree: Any) -> dict[str, Any]:
    """params/layer_0/attention/q/kernel -> leaf."""
    return flax.traverse_util.flatten_dict(tree, sep="/")


def sources(table: list[Row], shapes: Any) -> dict[str, Source]:
    """The source of every leaf of our tree of shapes."""
    leaves, found = flat(shapes), {}
    for theirs, ours, kind in table:
        group = (ours,) if isinstance(ours, str) else ours
        for part, module in enumerate(group):
            for tensor, (collection, leaf, axes) in KINDS[kind].items():
                name, path = (
                    ".".join(filter(None, (theirs, tensor))),
                    "/".join(filter(None, (collection, module, leaf))),
                )
                for where, names, stack in _layers(name, path, leaves):
                    shape = leaves[where].shape[len(stack) :]
                    shape = (*shape[:-1], shape[-1] * len(group)) if shape else shape
                    shape = shape if axes is None else tuple(np.array(shape)[np.argsort(axes)].tolist())
                    found[where] = Source(names, shape, axes, part, len(group), stack, kind in MERGED)
    if without := leaves.keys() - found.keys():
        raise UsageError(f"{', '.join(sorted(without))}: the table of names does not know them, add them there")
    return found


def _layers(name: str, path: str, leaves: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """(our path, names of theirs, sizes of our leading axes that count layers or experts) of those that there are."""
    stacked = path.replace("layer_{n}", "layers")
    whole = "{n}" in path and stacked in leaves
    for n in itertools.count():
        where = stacked if whole else path.format(n=n)
        if where not in leaves:
            return
        counted = "n" * whole + "e" * ("{e}" in name)
        stack = leaves[where].shape[: len(counted)]
        yield where, tuple(name.format(**{"n": n} | dict(zip(counted, at))) for at in np.ndindex(*stack)), stack
        if whole or "{n}" not in path:
            return
