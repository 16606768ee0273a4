"""GAN on MNIST or CIFAR-10, judged by the CNN of mnist_cnn.py.

Measured: frechet ratio 1.971 in 217 s on 2 CPU cores, commit 34da450.

    python experiments/generate/mnist_gan.py
    python experiments/generate/mnist_gan.py --data cifar10 --steps 50000 --no-augment  # 32×32×3, through TFDS
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import mnist_cnn
import optax
from etils import epath

import bigjax
from bigjax import UsageError, cli, optim, train
from bigjax.data import sources
from bigjax.data.augment import augment_images
from bigjax.experiment import Experiment, Published, RunConfig
from bigjax.look.evaluators import Judge, generated_images
from bigjax.look.gallery import generator_samples, nearest_training_images
from bigjax.models import Discriminator, Generator
from bigjax.run import workdir
from bigjax.tasks.gan import adversarial

ROWS = {
    "mnist_gan": {"data": "mnist5k", "metric": "eval/frechet_ratio"},
    "mnist_gan_cifar10": {
        "arguments": "--data cifar10 --steps 50000 --no-augment",
        "data": "cifar10",
        "metric": "eval/frechet_ratio",
    },
}

MIYATO = (
    "Miyato et al., Spectral normalization for generative adversarial networks, ICLR 2018: ResNet without classes; "
    "in the features of Inception, which frechet_ratio, in those of our judge, can't be compared with"
)


@dataclass(frozen=True)
class Config(RunConfig):
    data: str = "mnist5k"  # or mnist, cifar10 (TFDS), or a path to your own images
    steps: int | None = 3000
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
    judge: str | None = None  # a run of mnist_cnn.py on this data (default: our own), trained if there is none
    eval_every: int = 1000
    save_every: int = 1000


def judge_of(c: Config) -> Judge:
    """The CNN that judges: a finished run of mnist_cnn.py, or one made now."""
    own = "runs/mnist_cnn" if c.data == Config.data else f"runs/mnist_gan_judge_{Path(c.data).stem}"
    home = c.judge or own
    result = epath.Path(home) / "result.json"
    if not result.exists():
        if jax.process_index() == 0:
            print(f"training the judge, mnist_cnn.py on {c.data}, in {home}", file=sys.stderr, flush=True)
        here = {"mesh": c.mesh, "compilation_cache": c.compilation_cache}  # a run inside a run: on the same devices
        config = mnist_cnn.Config(workdir=home, data=c.data, eval_data=c.eval_data, **here)
        train.fit(dataclasses.replace(mnist_cnn.build(config), name="mnist_cnn"), config, quiet=True)
    if (there := workdir.read_config(home)["config"]["data"]) != c.data:
        raise UsageError(f"the judge in {home} knows {there}, not {c.data}: give another folder as --judge")
    return *bigjax.load(home), json.loads(result.read_text())["metrics"]["eval/accuracy"]


def build(c: Config) -> Experiment:
    data = sources.load(c.data, eval_data=c.eval_data, split_seed=c.split_seed)
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

    return Experiment(
        model={"generator": generator, "discriminator": discriminator},
        task=adversarial(generator, discriminator, loss=c.loss),
        tx=tx,
        train=data.train,
        test=data.test,
        augment=augment_images(shift=1.0, rotate=5.0) if c.augment else None,
        evaluators={"judge": generated_images(generator, lambda: judge_of(c), data.test)},
        gallery={
            "samples": generator_samples(generator),
            "nearest training images": nearest_training_images(generator, data.train),
        },
        published=[Published("eval/fid", 21.7, MIYATO, better="lower")] if c.data == "cifar10" else [],
    )


if __name__ == "__main__":
    cli.main(Config, build)
