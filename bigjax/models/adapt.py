"""Any model with most of it frozen: low-rank adapters beside its matrices (LoRA), or some of its parameters trained.

A, B: the two factors of an adapter, (…, inputs, rank) and (…, rank, outputs), with the leading axes of a stack of
layers or experts. Source: Hu et al. 2021.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from bigjax import UsageError

ADAPTER = re.compile(r"lora_[ab]$")
STACKS = {"layers", "experts"}  # parts of a path whose leading axis counts matrices
_flat, _nested = (
    lambda tree: flax.traverse_util.flatten_dict(tree, sep="/"),
    lambda tree: flax.traverse_util.unflatten_dict(tree, sep="/"),
)


class Adapted(nn.Module):
    """A model of which only named parameters are trained: `params` has these, the collection `frozen` all others.

    What is differentiated, updated and has optimizer state are `params`; `frozen` is carried, saved and split over a
    mesh as it is. All else of the model is as before: its fields, its methods, `apply(…, method=…)`; it is used
    through `init` and `apply` alone.

    model: any module. train: a regex of paths (layer_0/mlp/up/kernel) that are trained themselves. on: a regex of
    matrices that each get an adapter, W + alpha / rank × A B, A from a normal distribution with the variance
    1 / inputs, B zero: at first the model is as it was.

    Beside a kernel of `nn.Dense` the adapter computes x A B, two narrow products, and no gradient of W's size is ever
    made: that is why W + A B is not formed there, which would cost a product and a gradient as large as W's own. Other
    matrices (embeddings, experts) are used in more ways than one: of these W + A B is formed, and their gradient with
    it. Statistics of BatchNorm move whatever is frozen. UsageError: a regex that matches nothing, or no matrix.

        model = Adapted(GPT(), on=r"attention/(q|v)/kernel", rank=8)
        variables = model.init(jax.random.key(0), tokens_BL)  # {"params": adapters, "frozen": the rest}
    """

    model: nn.Module
    train: str | None = None
    on: str | None = None
    rank: int = 8
    alpha: float = 16.0

    @nn.nowrap
    def __call__(self, *inputs: Any, train: bool = False) -> Any:
        raise UsageError("an Adapted model is no part of another: adapt the whole, and use its init and apply")

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "model" not in vars(self):
            return super().__getattr__(name)
        return getattr(self.model, name)

    @nn.nowrap
    def init(self, rngs: Any, *args: Any, **options: Any) -> dict[str, Any]:
        with nn.intercept_methods(self._beside()):
            variables = dict(self.model.init(rngs, *args, **self._options(options)))
        every = _flat(variables["params"])
        every |= self._apart(every, rngs)
        there = [where for where in every if not ADAPTER.search(where)]
        trained = {w for w in there if self.train is not None and _regex(self.train).search(w)}
        if self.train is not None and not trained:
            raise UsageError(f"no parameter matches train {self.train!r}: there are {_listed(there)}")
        if self.on is not None and len(there) == len(every):
            matrices = [w for w in there if every[w].ndim - len(STACKS & {*w.split("/")}) == 2]
            raise UsageError(f"no matrix matches {self.on!r} for an adapter: there are {_listed(matrices)}")
        if self.train is self.on is None:
            raise UsageError("nothing of this model would be trained: say what by `train`, or by `on` for adapters")
        learnt = {w: x for w, x in every.items() if w in trained or ADAPTER.search(w)}
        frozen = {w: x for w, x in every.items() if w not in learnt}
        return {**variables, "params": _nested(learnt), "frozen": _nested(frozen)}

    @nn.nowrap
    def apply(self, variables: Mapping[str, Any], *args: Any, mutable: Any = False, **options: Any) -> Any:
        frozen = {k: v for k, v in variables.items() if k == "frozen"}
        own = {k: v for k, v in variables.items() if k != "frozen"} | {"params": self._whole(variables)}
        names = [mutable] if isinstance(mutable, str) else mutable
        inner = [n for n in names if n != "frozen"] if isinstance(names, list | tuple | set) else mutable
        with nn.intercept_methods(self._beside()):
            out = self.model.apply(own, *args, mutable=inner, **self._options(options))
        if mutable is False or not flax.core.scope.in_filter(mutable, "frozen"):
            return out
        return out[0], {**out[1], **frozen}

    @nn.nowrap
    def merged(self, variables: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        """(the model itself, its variables with each adapter added to its matrix)."""
        rest = {k: v for k, v in variables.items() if k not in ("params", "frozen")}
        return self.model, {"params": jax.jit(lambda v: self._whole(v, add=True))(dict(variables)), **rest}

    @nn.nowrap
    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Without `train` where the model takes none."""
        takes = given.get("method") is not None or "train" in inspect.signature(type(self.model).__call__).parameters
        return {k: v for k, v in given.items() if k != "train" or takes}

    @nn.nowrap
    def _beside(self) -> Callable[..., Any]:
        """Adds x A B to what a Dense gives whose kernel `on` matches."""

        def intercept(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            dense, y = context.module, call(*args, **kwargs)
            if self.on is None or not isinstance(dense, nn.Dense) or context.method_name != "__call__":
                return y
            if not _regex(self.on).search("/".join((*dense.path, "kernel"))):
                return y
            x, dtype = args[0] if args else kwargs["inputs"], dense.param_dtype
            a = dense.param("lora_a", _narrow(x.shape[-1]), (x.shape[-1], self.rank), dtype)
            b = dense.param("lora_b", nn.initializers.zeros, (self.rank, dense.features), dtype)
            x, a, b = nn.dtypes.promote_dtype(x, a, b * (self.alpha / self.rank), dtype=dense.dtype)
            return y + jnp.dot(jnp.dot(x, a), b).astype(y.dtype)

        return intercept

    @nn.nowrap
    def _apart(self, every: Mapping[str, Array], rngs: Any) -> dict[str, Array]:
        """The adapters of matrices that `on` matches and no Dense has."""
        found, key = {}, rngs["params"] if isinstance(rngs, Mapping) else rngs
        for n, (where, w) in enumerate(sorted(every.items())):
            own = where.rpartition("/")[0] + "/lora_a"
            if self.on is None or ADAPTER.search(where) or own in every or not _regex(self.on).search(where):
                continue
            stacks = len(STACKS & {*where.split("/")})
            if w.ndim - stacks != 2:
                if w.ndim - stacks < 2:
                    continue
                raise UsageError(f"{where} {w.shape}, which {self.on!r} matches, is no matrix: match other ones")
            *lead, inputs, outputs = w.shape
            a = _narrow(inputs)(jax.random.fold_in(key, n), (*lead, inputs, self.rank), w.dtype)
            found |= {f"{where}_lora_a": a, f"{where}_lora_b": jnp.zeros((*lead, self.rank, outputs), w.dtype)}
        return found

    @nn.nowrap
    def _whole(self, variables: Mapping[str, Any], *, add: bool = False) -> dict[str, Any]:
        """The model's own parameters, and the adapters that a Dense applies, unless these are to be added too."""
        every = _flat(variables["params"]) | _flat(variables.get("frozen", {}))
        for where in [w for w in every if w.endswith("lora_a")]:
            matrix = where.removesuffix("_lora_a") if where.endswith("_lora_a") else where[: -len("lora_a")] + "kernel"
            if add or where.endswith("_lora_a"):
                a, b = every.pop(where), every.pop(where[:-1] + "b")
                every[matrix] += jnp.matmul(a, b * (self.alpha / self.rank)).astype(every[matrix].dtype)
        return _nested(every)


def _narrow(inputs: int) -> Callable[..., Array]:
    return nn.initializers.normal(inputs**-0.5)


def _regex(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise UsageError(f"{pattern!r} is no regular expression ({e}): write it as 'attention/(q|v)/kernel'") from None


def _listed(paths: list[str]) -> str:
    return ", ".join(dict.fromkeys(re.sub(r"_\d+\b", "_N", path) for path in sorted(paths))) or "none"
