"""GAN on MNIST, judged by the CNN of mnist_cnn.py.

Measured: not yet.

    python experiments/mnist_gan.py
    python experiments/mnist_gan.py --data cifar10 --steps 50000             # 32×32×3, through TFDS
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import mnist_cnn
import optax
from etils import epath

import bigjax
from bigjax import cli, optim, train
from bigjax.data import sources
from bigjax.data.augment import augment_images
from bigjax.evaluators import generated_images
from bigjax.experiment import Experiment, RunConfig
from bigjax.gallery import generator_samples, nearest_training_images
from bigjax.generative import adversarial
from bigjax.models import Discriminator, Generator


@dataclass(frozen=True)
class Config(RunConfig):
    data: str = "mnist5k"  # or mnist, cifar10 (TFDS), or a path to your own images
    steps: int | None = 4000
    batch_size: int = 64
    learning_rate: float = 1e-3  # of the generator
    discriminator_rate: float = 1e-3
    loss: Literal["non-saturating", "hinge", "wasserstein-gp"] = "non-saturating"
    latent: int = 64
    generator_features: tuple[int, ...] = (64, 32, 16)
    discriminator_features: tuple[int, ...] = (32, 64)
    spectral_norm: bool = True
    conditional: bool = True  # the generator is given a class
    ema: float = 0.995
    augment: bool = True  # shifts and small rotations of the real images
    judge: str = "runs/mnist_cnn"  # a run of mnist_cnn.py; trained now if there is none
    eval_every: int = 1000
    save_every: int = 1000


def judge_of(c: Config) -> tuple[nn.Module, Mapping[str, Any], float]:
    """(module, variables, test accuracy) of the CNN that judges: a finished run of mnist_cnn.py, or one made now."""
    result = epath.Path(c.judge) / "result.json"
    if not result.exists():
        config = mnist_cnn.Config(workdir=c.judge, data=c.data)
        train.fit(dataclasses.replace(mnist_cnn.build(config), name="mnist_cnn"), config)
    return *bigjax.load(c.judge), json.loads(result.read_text())["metrics"]["eval/accuracy"]


def build(c: Config) -> Experiment:
    data = sources.load(c.data, eval_data=c.eval_data, seed=c.seed)
    image = tuple(int(n) for n in data.train["image"].shape[1:])
    classes = data.classes if c.conditional else 0
    generator = Generator(
        image=image, latent=c.latent, features=c.generator_features, batch_norm=True, classes=classes, dtype=c.dtype
    )
    discriminator = Discriminator(
        features=c.discriminator_features,
        pool="flatten",
        spectral_norm=c.spectral_norm,
        classes=classes,
        use_bias=True,
        dtype=c.dtype,
    )

    def tx(steps: int) -> dict[str, optax.GradientTransformation]:
        rates = {"discriminator": c.discriminator_rate, "generator": c.learning_rate}
        return {
            k: optax.adam(optim.schedule("cosine", rate, steps=steps), b1=0.5, b2=0.99) for k, rate in rates.items()
        }

    judge, variables, accuracy = judge_of(c)
    return Experiment(
        model={"generator": generator, "discriminator": discriminator},
        task=adversarial(generator, discriminator, loss=c.loss),
        tx=tx,
        train=data.train,
        test=data.test,
        augment=augment_images(shift=1.0, rotate=5.0) if c.augment else None,
        evaluators={"judge": generated_images(generator, judge, variables, data.test)},
        gallery={
            "samples": generator_samples(generator),
            "nearest training images": nearest_training_images(generator, data.train),
        },
        facts={"judge_accuracy": accuracy},
    )


if __name__ == "__main__":
    cli.main(Config, build)
