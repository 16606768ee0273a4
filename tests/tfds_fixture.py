"""Builds real TFDS sets (array_record files) without TensorFlow, for tests to read by their names."""

import contextlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def build_set(
    folder: str | os.PathLike,
    name: str,
    version: str,
    features: Callable[[Any], Mapping[str, Any]],
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    config: str | None = None,
    shards: int | None = None,
    supervised: tuple[str, str] | None = None,
) -> None:
    """Writes `folder`/`name`[/`config`]/`version` from examples by split; features: tfds.features -> those of the set.

    Images are given as arrays, or as what PNG files hold, and go in as PNG bytes: arrays would need TensorFlow.
    """
    import tensorflow_datasets as tfds

    made = tfds.features.FeaturesDict(features(tfds.features))
    images = [k for k, feature in made.items() if isinstance(feature, tfds.features.Image)]

    with tfds.core.registered.skip_registration():  # TFDS has its own builder of this name

        class Set(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version(version)
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

            def _info(self) -> tfds.core.DatasetInfo:
                return tfds.core.DatasetInfo(builder=self, features=made, supervised_keys=supervised)

            def _split_generators(self, dl_manager: object) -> dict:
                return {split: self._generate_examples(rows) for split, rows in splits.items()}

            def _generate_examples(self, rows: Sequence[Mapping[str, Any]]):
                for n, row in enumerate(rows):
                    yield n, {k: png(v) if k in images else v for k, v in row.items()}

    Set.name = name
    options = tfds.download.DownloadConfig(num_shards=shards) if shards else None
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):  # bars of progress
        Set(data_dir=os.fspath(folder), file_format="array_record").download_and_prepare(download_config=options)


def png(image: np.ndarray | bytes) -> io.BytesIO:
    """Of (H,W), (H,W,1) or (H,W,C) uint8, or (H,W) uint16."""
    from PIL import Image

    if isinstance(image, bytes):
        return io.BytesIO(image)
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image).save(buffer, format="PNG")
    return io.BytesIO(buffer.getvalue())


def build_mnist(folder: str | os.PathLike, images_NHW: np.ndarray, labels_N: np.ndarray, *, test: int = 0) -> None:
    """Writes `folder`/mnist/3.0.1 from uint8 images; the last `test` are the split `test`, if any."""
    rows = [{"image": image_HW, "label": int(label)} for image_HW, label in zip(images_NHW, labels_N, strict=True)]
    cut = len(rows) - test
    build_set(
        folder,
        "mnist",
        "3.0.1",
        lambda f: {"image": f.Image(shape=(*images_NHW.shape[1:], 1)), "label": f.ClassLabel(num_classes=10)},
        {"train": rows[:cut]} | ({"test": rows[cut:]} if test else {}),
    )
