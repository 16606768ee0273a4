"""Files that are there whole or not at all, on a disk or in a bucket."""

from etils import epath
from fsspec.config import conf

from bigjax import SaveError

FULL = ("No space left on device", "Disk quota exceeded", "RESOURCE_EXHAUSTED")

# gcsfs remembers the listings of folders, and forever: what TensorStore or another process writes there would be missed
conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def write_whole(path: epath.Path, content: bytes) -> None:
    """Writes a file by renaming a complete one."""
    if "://" in str(path):  # a bucket shows objects only when they are whole
        path.write_bytes(content)
        return
    part = path.parent / (path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def unwritten(e: BaseException, what: str) -> SaveError:
    """Of what the file system says of a file."""
    said = next(iter(str(e).strip().splitlines()), type(e).__name__)
    for cause in FULL + ("Read-only file system", "Permission denied"):
        said = cause if cause in said and len(said) > 200 else said  # tensorstore tells much more
    where = "make room there" if any(cause in said for cause in FULL) else "make it writable"
    return SaveError(f"{what} ({said[:200]}): {where}, or choose another --workdir, and run again")
