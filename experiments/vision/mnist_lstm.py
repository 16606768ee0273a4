"""LSTM on MNIST: an image is read as 28 rows of 28 pixels.

Measured: accuracy 98.6 ± 0.1 % (5 seeds) in 187 s on 2 CPU cores, commit 821568b.

    python experiments/vision/mnist_lstm.py                                         # 4,000 embedded images
    python experiments/vision/mnist_lstm.py --data mnist --steps 20000              # all 60,000, through TFDS
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from bigjax import cli, optim
from bigjax.data import reading, sources
from bigjax.data.augment import Augmentation
from bigjax.experiment import Experiment, Fraction, Positive, RunConfig
from bigjax.look.gallery import worst_mistakes
from bigjax.models import LSTM
from bigjax.tasks import classify

TAKES = ("image", "label")
ROWS = {
    "mnist_lstm": {"data": "mnist5k", "metric": "eval/accuracy", "seeds": 5},
}


@dataclass(frozen=True)
class Config(RunConfig):
    data: str = "mnist5k"  # or mnist (TFDS), or a path to your own images
    images: cli.Flat[reading.Images] = reading.Images()
    steps: int | None = 4500
    batch_size: int = 64
    adamw: cli.Flat[optim.AdamW] = optim.AdamW(learning_rate=3e-3, weight_decay=0.2, clip=1.0)
    cell: Literal["lstm", "gru", "rnn"] = "lstm"  # kind of the recurrent layers
    hidden: Annotated[tuple[int, ...], Positive] = (128, 128)  # units of each layer
    bidirectional: bool = False  # read each image from below too
    dropout: Annotated[float, Fraction] = 0.2  # share dropped of each layer
    label_smoothing: Annotated[float, Fraction] = 0.05  # share of the target spread over all classes
    augmentation: cli.Flat[Augmentation] = Augmentation(rotate=12.0, shift=2.0, scale=0.12, shear=0.2, warp=0.2)


def build(c: Config) -> Experiment:
    data = sources.load(c.data, eval_data=c.eval_data, split_seed=c.split_seed, takes=TAKES, **vars(c.images))
    mean, std = sources.image_statistics(data.train)
    model = LSTM(
        cell=c.cell,
        hidden=c.hidden,
        bidirectional=c.bidirectional,
        outputs=data.classes,
        dropout=c.dropout,
        mean=mean,
        std=std,
        dtype=c.dtype,
    )
    return Experiment(
        task=classify(model, classes=data.classes, label_smoothing=c.label_smoothing),
        tx=c.adamw,
        train=data.train,
        test=data.test,
        class_names=data.class_names,
        augment=c.augmentation.function(),
        gallery={"worst mistakes": worst_mistakes(model, data.test, class_names=data.class_names)},
    )


if __name__ == "__main__":
    cli.main(Config, build)
