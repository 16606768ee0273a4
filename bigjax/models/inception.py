"""Inception v3: blocks of branches, whose kernels are factored into smaller ones.

B batch, H height, W width, C channels, K outputs. Source: Szegedy et al. 2016, with the names that torchvision gave its
parts.
"""

import re
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError
from bigjax.models.layers import BatchNorm, normalize
from bigjax.sharding import constrain

# FEATURES:HEIGHTxWIDTH of each convolution of a branch, one after the other; /2 halves the image; a|b are two that see
# the same; P is what differs among blocks of a kind. Those that halve, and those with v, see no further than the edge.
STEM = (
    ("1a_3x3", "32:3/2"),
    ("2a_3x3", "32:3v"),
    ("2b_3x3", "64:3"),
    "max",
    ("3b_1x1", "80:1"),
    ("4a_3x3", "192:3v"),
    "max",
)
BLOCKS = {
    "A": {
        "branch1x1": "64:1",
        "branch5x5": "48:1 64:5",
        "branch3x3dbl": "64:1 96:3 96:3",
        "branch_pool": "mean P:1",
    },
    "B": {"branch3x3": "384:3/2", "branch3x3dbl": "64:1 96:3 96:3/2", "pool": "max"},
    "C": {
        "branch1x1": "192:1",
        "branch7x7": "P:1 P:1x7 192:7x1",
        "branch7x7dbl": "P:1 P:7x1 P:1x7 P:7x1 192:1x7",
        "branch_pool": "mean 192:1",
    },
    "D": {"branch3x3": "192:1 320:3/2", "branch7x7x3": "192:1 192:1x7 192:7x1 192:3/2", "pool": "max"},
    "E": {
        "branch1x1": "320:1",
        "branch3x3": "384:1 384:1x3|384:3x1",
        "branch3x3dbl": "448:1 384:3 384:1x3|384:3x1",
        "branch_pool": "mean 192:1",
    },
}
V3 = ("5b A 32", "5c A 64", "5d A 64", "6a B", "6b C 128", "6c C 160", "6d C 160", "6e C 192", "7a D", "7b E", "7c E")


class Unit(nn.Module):
    """relu(norm(convolution)) as `form` says: 384:1x3, 96:3/2."""

    form: str
    part: int
    shrink: int
    train: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        features, height, width, mark = re.fullmatch(r"(\w+):(\d+)(?:x(\d+))?(/2|v)?", self.form).groups()
        size = (int(height), int(width or height))
        count = max(1, (self.part if features == "P" else int(features)) // self.shrink)
        pad = "VALID" if mark else [(n // 2, n // 2) for n in size]
        init = nn.initializers.truncated_normal(0.1)
        fields = {"strides": 2 if mark == "/2" else 1, "padding": pad, "use_bias": False, "kernel_init": init}
        x = nn.Conv(count, size, dtype=self.dtype, **fields, name="conv")(x)
        return nn.relu(BatchNorm(self.train, epsilon=1e-3, dtype=self.dtype, name="norm")(x))


class Block(nn.Module):
    """All branches of one kind of block, side by side along the channels."""

    kind: str
    part: int
    shrink: int
    train: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        outs = []
        for branch, forms in BLOCKS[self.kind].items():
            ys = [x]
            for names, step in steps(branch, forms):
                if names:
                    given = (self.part, self.shrink, self.train, self.dtype)
                    ys = [Unit(form, *given, name=name)(ys[0]) for name, form in zip(names, step.split("|"))]
                elif step == "max":
                    ys = [nn.max_pool(ys[0], (3, 3), (2, 2))]
                else:
                    ys = [mean_pool(ys[0], 3, 1, "SAME")]
            outs += ys
        return jnp.concatenate(outs, axis=-1)


def mean_pool(x: Array, size: int, stride: int, padding: str) -> Array:
    """The mean of windows, in which zeros beyond the edge count; `nn.avg_pool` does not go with strict dtypes."""
    return nn.pool(x, 0.0, jax.lax.add, (size, size), (stride, stride), padding) / float(size * size)


def steps(branch: str, forms: str) -> Iterator[tuple[list[str], str]]:
    """(names of the units, their forms) of each step of a branch; a pooling has no names."""
    convolutions = [f for f in forms.split() if ":" in f]
    number = 0
    for step in forms.split():
        if ":" not in step:
            yield [], step
            continue
        number += 1
        name = branch if len(convolutions) == 1 else f"{branch}_{number}"
        yield [name + letter for letter in ("ab" if "|" in step else [""])], step


class Inception(nn.Module):
    """image_BHWC -> logits_BK float32 (Szegedy et al. 2016): Inception v3, for images of 299 pixels, at least 75.

    blocks: "NAME KIND P" of each, where P is the kind's free number of features. shrink: divides all widths.
    aux: a second head behind block 6e, for images of 299 pixels and more, whose logits are sown in training.
    mean, std: normalise the pixels: one number, or one a channel. dropout: before the logits.
    Sown: intermediates/features, (B, C), what the head sees; aux_logits, (B, K). Mistakes raise `UsageError`.

        model = Inception()
        variables = model.init(jax.random.key(0), jnp.zeros((1, 299, 299, 3)))
        logits_BK = model.apply(variables, image_BHWC)
    """

    outputs: int = 1000
    blocks: tuple[str, ...] = V3
    shrink: int = 1
    aux: bool = False
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    dropout: float = 0.5
    dtype: str = "float32"

    def least_side(self) -> int:
        """The pixels a side that the blocks need."""
        side = 1
        for name, kind, *_ in map(str.split, reversed(self.blocks)):
            side = max(side, 17) if self.aux and name == "6e" else side
            side = 2 * side + 1 if kind in "BD" else side
        return 2 * (2 * (2 * side + 1 + 2) + 1 + 2) + 1

    @nn.compact
    def __call__(self, image_BHWC: Array, *, train: bool = False) -> Array:
        least = self.least_side()
        if image_BHWC.ndim != 4 or min(image_BHWC.shape[1:3]) < least:
            raise UsageError(
                f"an Inception takes images (batch, height, width, channels) of at least {least} pixels a side, not an "
                f"array of shape {image_BHWC.shape}: resize them"
            )
        unit = (0, self.shrink, train, self.dtype)
        x = constrain(normalize(image_BHWC, self.mean, self.std, dtype=self.dtype), "batch")
        for part in STEM:
            x = nn.max_pool(x, (3, 3), (2, 2)) if part == "max" else Unit(part[1], *unit, name=f"conv_{part[0]}")(x)
        for name, kind, *rest in map(str.split, self.blocks):
            if kind not in BLOCKS:
                raise UsageError(f"an Inception has no block {kind!r}: use one of {', '.join(BLOCKS)}")
            x = Block(kind, int(rest[0]) if rest else 0, *unit[1:], name=f"mixed_{name}")(x)
            if self.aux and name == "6e":
                self.sow("intermediates", "aux_logits", self._aux(x, unit))
        x_BC = x.mean((1, 2))
        self.sow("intermediates", "features", x_BC)
        x_BC = nn.Dropout(self.dropout)(x_BC, deterministic=not train)
        return nn.Dense(self.outputs, dtype=self.dtype, name="logits")(x_BC).astype(jnp.float32)

    def _aux(self, x: Array, unit: tuple) -> Array:
        x = mean_pool(x, 5, 3, "VALID")
        for n, form in enumerate(("128:1", "768:5v")):
            x = Unit(form, *unit, name=f"aux_conv_{n}")(x)
        return nn.Dense(self.outputs, dtype=self.dtype, name="aux_head")(x.mean((1, 2))).astype(jnp.float32)


TINY = Inception(outputs=3, blocks=("5b A 32", "7c E"), shrink=16, dropout=0.1)
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 43, 43, 3), "float32"),)
