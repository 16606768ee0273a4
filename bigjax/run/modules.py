"""A Linen module as JSON, and back."""

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from etils import epath

from bigjax import UsageError


def module_spec(module: nn.Module) -> dict[str, Any]:
    """A Linen module as JSON: its class and its fields."""

    cls = type(module)

    def value(name: str, v: Any) -> Any:
        if isinstance(v, nn.Module):
            return module_spec(v)
        if isinstance(v, tuple | list):
            return [value(name, part) for part in v]
        if v is not None and not isinstance(v, bool | int | float | str):
            raise UsageError(
                f"field {name} of {cls.__qualname__} is a {type(v).__name__}, which a run cannot record: make it "
                "a number, a text (a name to look up), a module or a tuple of these"
            )
        return v

    spec = {"class": f"{cls.__module__}.{cls.__qualname__}"}
    if cls.__module__ == "__main__" and hasattr(sys.modules["__main__"], "__file__"):
        spec["file"] = str(epath.Path(sys.modules["__main__"].__file__).resolve())
    names = [f.name for f in dataclasses.fields(module) if f.init and f.name not in ("parent", "name")]
    return {**spec, "fields": {n: value(n, getattr(module, n)) for n in names}}


def module_from(spec: Mapping[str, Any]) -> nn.Module:
    """The module that `module_spec` described."""
    where, _, name = spec["class"].rpartition(".")
    main = getattr(sys.modules["__main__"], "__file__", None)
    if "file" in spec and main and str(epath.Path(main).resolve()) == spec["file"]:
        module = sys.modules["__main__"]  # the script itself asks: it must not run once more
    elif "file" in spec:
        if not epath.Path(spec["file"]).exists():
            raise UsageError(f"the script {spec['file']} that defines {name} is gone: put it back to load this run")
        loader = importlib.util.spec_from_file_location("bigjax_run_script", spec["file"])
        module = sys.modules[loader.name] = importlib.util.module_from_spec(loader)  # dataclasses look their module up
        loader.loader.exec_module(module)
    else:
        module = importlib.import_module(where)

    def value(v: Any) -> Any:
        if isinstance(v, dict) and "class" in v:
            return module_from(v)
        return tuple(map(value, v)) if isinstance(v, list) else v

    return getattr(module, name)(**{k: value(v) for k, v in spec["fields"].items()})
