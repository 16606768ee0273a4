"""Places that are there, and places that are one."""

import contextlib
import logging
import os
from typing import Any

from bigjax import UsageError, place


def reached(path: Any) -> Any:
    """The same place. UsageError: a bucket that can't be reached."""
    if "://" in str(path):
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it tries again is no news
        try:
            path.exists()
        except Exception as e:  # whatever the network and the credentials do to gcsfs
            why = f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"
            bucket = "/".join(str(path).split("/")[:3])
            raise UsageError(f"{path} cannot be reached ({why}): try python -m bigjax doctor --workdir {bucket}") from e
    return path


def one_place(old: Any, new: Any, folder: str = "") -> bool:
    """Whether two settings are one file or folder that is there, spelled in two ways; `folder` is where the old was."""
    if not (isinstance(old, str) and isinstance(new, str) and old.strip() and new.strip()):
        return False
    if old.startswith("tokens:") and new.startswith("tokens:"):
        old, new = old.removeprefix("tokens:"), new.removeprefix("tokens:")
    with contextlib.suppress(UsageError, OSError, ValueError):  # settings may be anything, a separator for instance
        paths = [place(old), place(new)]
        if any("://" in str(p) for p in paths):
            return paths[0] == paths[1]
        before, now = os.path.realpath(os.path.join(folder, paths[0])), os.path.realpath(paths[1])
        return before == now and os.path.exists(now)
    return False
