"""What code a run is made of: versions, the commit, and what no commit holds."""

import functools
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import bigjax

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
LARGEST = 2**20  # bytes of a file that `edits` holds


def version(name: str) -> str:
    """Of an installed library; of bigjax from a mere checkout what its source says."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{bigjax.__version__}+source" if name == "bigjax" else "unknown"


def versions() -> dict[str, str]:
    return {"python": sys.version.split()[0], **{name: version(name) for name in ("bigjax", *LIBRARIES)}}


def git(*arguments: str, folder: Path | None = None) -> str | None:
    """What git prints in a folder (the current one), or None where there is no repository or no git."""
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def script() -> Path | None:
    """The script that runs; None in a notebook, or under a command that is installed, as pytest is."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    path = Path(file).resolve() if file else None
    return path if path and path.is_file() and not installed(path) else None


def installed(path: Path) -> bool:
    return "site-packages" in path.parts or any(path.is_relative_to(p) for p in _prefixes())


@functools.cache
def _prefixes() -> set[Path]:
    """Where Python itself is, and the environment that is used."""
    return {Path(p).resolve() for p in (sys.prefix, sys.base_prefix)}


def repository() -> Path | None:
    """The top folder of the git repository that a run is of: the script's, or the current folder's without a script.

    Where there is none, that of bigjax' own source, if it is a checkout.
    """
    file, library = script(), Path(bigjax.__file__).resolve()
    top = git("rev-parse", "--show-toplevel", folder=file.parent if file else None)
    if top is None and git("ls-files", "--error-unmatch", library.name, folder=library.parent):
        top = git("rev-parse", "--show-toplevel", folder=library.parent)
    return Path(top.removesuffix("\n")) if top else None


def commit() -> str | None:
    top = repository()
    return (git("rev-parse", "HEAD", folder=top) or "").strip() or None if top else None


def edits() -> str:
    """A patch: what was edited in the repository since its commit, and the script and modules beside it that git
    doesn't track, as new files. Those that are no text, or larger than LARGEST, are left out.
    """
    top, file = repository(), script()
    patch = (git("diff", "HEAD", folder=top) or "") if top else ""
    roots = [root for root in (top, file.parent if file else None) if root]  # in this order: the first that holds it
    tracked = set((git("ls-files", "-z", folder=top) or "").split("\0")) if top else set()
    loaded = {Path(f) for name, m in list(sys.modules.items()) if (f := getattr(m, "__file__", None))
              and name.partition(".")[0] != "bigjax"}  # fmt: skip
    for path in sorted({file, *loaded} - {None}):
        root = next((r for r in roots if path.is_relative_to(r)), None)
        if root is None or path.suffix != ".py" or installed(path):
            continue
        name = path.relative_to(root).as_posix()
        if not (root == top and name in tracked):
            patch += new_file(name, path)
    return patch


def new_file(name: str, path: Path) -> str:
    """A file as a patch that makes it; nothing of one that is no text, too large, or gone."""
    try:
        text = path.read_bytes().decode() if path.stat().st_size <= LARGEST else ""
    except (OSError, UnicodeDecodeError):
        return ""
    if not text:
        return ""
    lines = text.removesuffix("\n").split("\n")
    head = [f"diff --git a/{name} b/{name}", "new file mode 100644", "--- /dev/null", f"+++ b/{name}"]
    end = [] if text.endswith("\n") else ["\\ No newline at end of file"]
    return "\n".join([*head, f"@@ -0,0 +1,{len(lines)} @@", *("+" + line for line in lines), *end]) + "\n"
