"""Builds a real TFDS `mnist` set (array_record files) without TensorFlow, for tests to read by name."""

import io
import os

import numpy as np


def build_mnist(folder: str | os.PathLike, images_NHW: np.ndarray, labels_N: np.ndarray, *, test: int = 0) -> None:
    """Writes `folder`/mnist/3.0.1 from uint8 images; the last `test` are the split `test`, if any.

    Images go in as PNG bytes: arrays would need TensorFlow to encode.
    """
    import tensorflow_datasets as tfds
    from PIL import Image

    def png(image_HW: np.ndarray) -> io.BytesIO:
        buffer = io.BytesIO()
        Image.fromarray(image_HW).save(buffer, format="PNG")
        return io.BytesIO(buffer.getvalue())

    with tfds.core.registered.skip_registration():  # TFDS has its own builder of this name

        class Mnist(tfds.core.GeneratorBasedBuilder):
            name = "mnist"
            VERSION = tfds.core.Version("3.0.1")

            def _info(self) -> tfds.core.DatasetInfo:
                height, width = images_NHW.shape[1:3]
                features = {
                    "image": tfds.features.Image(shape=(height, width, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager: object) -> dict:
                cut = len(images_NHW) - test
                splits = {"train": self._generate_examples(range(cut))}
                return splits | ({"test": self._generate_examples(range(cut, len(images_NHW)))} if test else {})

            def _generate_examples(self, rows: range):
                for row in rows:
                    yield row, {"image": png(images_NHW[row]), "label": int(labels_N[row])}

    Mnist(data_dir=os.fspath(folder), file_format="array_record").download_and_prepare()
