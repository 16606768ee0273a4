"""bigjax: functional Flax models, one sharded train step, from a laptop's CPU to a TPU pod."""

__version__ = "0.1.0"


class UsageError(Exception):
    """Something the user can put right. The text is one line: the cause, then the next action.

    It is shown without a traceback.
    """


class SaveError(UsageError):
    """A checkpoint could not be saved; the library that saves then leaves a thread behind that waits forever."""


def __getattr__(name: str):  # lazily, so that importing bigjax.models stays as cheap as importing flax
    if name == "load":
        from bigjax.workdir import load

        return load
    raise AttributeError(f"module 'bigjax' has no attribute {name!r}")
