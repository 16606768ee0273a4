"""Models: Flax Linen modules, architecture only. `from bigjax.models import CNN`; `init`, `apply`, nothing else."""

from importlib import import_module
from typing import Any

_FILES = {
    "MLP": "mlp",
    "CNN": "cnn",
    "LSTM": "lstm",
    "GPT": "gpt",
    "Generator": "gan",
    "Discriminator": "gan",
    "Autoencoder": "autoencoder",
    "ConvAutoencoder": "autoencoder",
    "VAE": "autoencoder",
}
__all__ = sorted(_FILES)


def __getattr__(name: str) -> Any:  # each family's file is read when it is first asked for
    if name in _FILES:
        return getattr(import_module(f"bigjax.models.{_FILES[name]}"), name)
    raise AttributeError(f"module 'bigjax.models' has no attribute {name!r}")
