"""Files that are there whole or not at all, on a disk or in a bucket."""

from etils import epath
from fsspec.config import conf

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
