"""Pictures and texts of a run's gallery: as files of its working directory, and as they are in its report.

Letters: N pictures, H height, W width, C channels.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
from etils import epath

from bigjax import UsageError

LARGE, SMALL = 900, 300  # pixels of the page: the newest, and each of those before
EARLIER = 6  # shown of those before


class SavedPictures(NamedTuple):
    images: np.ndarray  # (N,H,W) or (N,H,W,C) uint8
    captions: Sequence[str] | None
    columns: int  # of the grid


def save_gallery(workdir: epath.PathLike, step: int, *, name: str, item: Any) -> epath.Path:
    """Writes gallery/{step}-{name}.npz or, where item is a str, .txt, and returns its path.

    Pictures: an object with `images` (N,H,W[,C]), float in [0,1] or uint8; `captions`, one an image, or None;
    `columns`. Colours are C of 1, 3 or 4; of other C the mean is kept. Raises UsageError where they are not that.
    """
    (folder := epath.Path(workdir) / "gallery").mkdir(parents=True, exist_ok=True)
    path = folder / f"{step:08d}-{quote(name, safe=' ')}.{'txt' if isinstance(item, str) else 'npz'}"
    if isinstance(item, str):
        path.write_bytes(item.encode())
        return path
    images = np.asarray(item.images)
    if images.ndim not in (3, 4):
        raise UsageError(f"gallery {name!r} has images {images.shape}: give (N,H,W) or (N,H,W,C)")
    if images.shape[3:] not in ((), (1,), (3,), (4,)):
        images = images.mean(-1, dtype=np.float32).astype(images.dtype)
    captions = [""] * len(images) if item.captions is None else [str(c) for c in item.captions]
    if len(captions) != len(images):
        raise UsageError(f"gallery {name!r}: {len(captions)} captions for {len(images)} images: give one each, or None")
    if images.dtype != np.uint8:
        images = np.clip(np.round(np.nan_to_num(images.astype(np.float32)) * 255), 0, 255).astype(np.uint8)
    np.savez_compressed(buffer := io.BytesIO(), images=images, captions=np.array(captions, str), columns=item.columns)
    path.write_bytes(buffer.getvalue())
    return path


def load_gallery(workdir: epath.PathLike) -> dict[str, dict[int, SavedPictures | str]]:
    """What `save_gallery` wrote: {name: {step: item}}, sorted. Raises UsageError naming a file that can't be read."""
    folder, gallery = epath.Path(workdir) / "gallery", {}
    for path in folder.iterdir() if folder.exists() else ():
        if match := re.fullmatch(r"(\d+)-(.+)\.(npz|txt)", path.name):
            try:
                item = path.read_bytes()
                if match[3] == "npz":
                    with np.load(io.BytesIO(item), allow_pickle=False) as file:
                        captions = [str(c) for c in file["captions"]]
                        item = SavedPictures(file["images"], captions if any(captions) else None, int(file["columns"]))
                gallery.setdefault(unquote(match[2]), {})[int(match[1])] = item if match[3] == "npz" else item.decode()
            except Exception as error:  # zip, key, dtype and text errors alike: not what save_gallery writes
                raise UsageError(f"{path} can't be read ({type(error).__name__}): delete it, then try again") from error
    return {name: dict(sorted(gallery[name].items())) for name in sorted(gallery)}


def _png(image: np.ndarray, *, width: float, caption: str) -> str:
    from PIL import Image

    Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image).save(buffer := io.BytesIO(), "png")
    data, caption = base64.b64encode(buffer.getvalue()).decode(), escape(caption)
    picture = f'<img style="width:{width:.0f}px" alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _show_item(item: SavedPictures | str, *, width: int, caption: str) -> str:
    """One item; small ones are the first few pictures of each of the first few rows, as large as can be judged."""
    if isinstance(item, str) or not len(item.images):
        return f"<small>{caption}</small><pre>{escape(item) if isinstance(item, str) else 'none'}</pre>"
    if item.captions and width == LARGE:
        cells = [_png(x, width=150, caption=c) for x, c in zip(item.images, item.captions, strict=True)]
        return f'<small>{caption}</small><div class="wide grid" style="--n:{item.columns}">{"".join(cells)}</div>'
    columns = min(max(1, item.columns), len(item.images))
    pad = [(0, -len(item.images) % columns), (0, 1), (0, 1), (0, 0)]  # full rows, the pictures a grey pixel apart
    images = np.pad(item.images, pad[: item.images.ndim], constant_values=127)
    rows = images.reshape(-1, columns, *images.shape[1:]).swapaxes(1, 2)  # rows, H, columns, W[, C]
    if width == SMALL:
        rows = rows[:4, :, : min(5, max(1, width // images.shape[2]))]
    tile = rows.reshape(rows.shape[0] * rows.shape[1], rows.shape[2] * rows.shape[3], *rows.shape[4:])
    return _png(tile, width=tile.shape[1] * max(1, width // tile.shape[1]), caption=caption)


def gallery_page(gallery: Mapping[str, Mapping[int, SavedPictures | str]]) -> str:
    """The newest of each name large; under it a few earlier ones, as it came about."""
    page = ""
    for name, items in gallery.items():
        *earlier, newest = items
        chosen = [earlier[round(i)] for i in np.linspace(0, len(earlier) - 1, min(EARLIER, len(earlier)))]
        row = "".join(f"<div>{_show_item(items[step], width=SMALL, caption=f'step {step:,}')}</div>" for step in chosen)
        page += f"<h2>{escape(name)}</h2>{_show_item(items[newest], width=LARGE, caption=f'step {newest:,}')}"
        page += f'<h3>Before</h3><div class="row">{row}</div>' if row else ""
    return page
