"""GAN on MNIST or CIFAR-10, measured in the features of a classifier, the CNN of vision/mnist_cnn.py.

Measured: frechet ratio 1.971 in 217 s on 2 CPU cores, commit 34da450.

    python experiments/generate/mnist_gan.py
    python experiments/generate/mnist_gan.py --data cifar10 --steps 50000 --no-augment  # 32×32×3, through TFDS
"""

import json
import runpy
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

import tyro
from etils import epath

from bigjax import UsageError, cli, load, optim, place, train
from bigjax.data import reading, sources
from bigjax.data.augment import Augmentation
from bigjax.experiment import Experiment, Positive, Published, RunConfig, size_of
from bigjax.look.display import telling
from bigjax.look.evaluators import Classifier, generated_images
from bigjax.look.gallery import generator_samples, nearest_training_images
from bigjax.models import Discriminator, Generator
from bigjax.run import workdir
from bigjax.tasks.gan import adversarial

TAKES = ("image", "label")
ROWS = {
    "mnist_gan": {"data": "mnist5k", "metric": "eval/frechet_ratio"},
    "mnist_gan_cifar10": {
        "arguments": "--data cifar10 --steps 50000 --no-augment",
        "data": "cifar10",
        "metric": "eval/frechet_ratio",
    },
}
MIYATO = "Miyato et al., Spectral normalization for GANs, ICLR 2018, without classes; in Inception's features, not ours"


@dataclass(frozen=True)
class Config(RunConfig):
    data: str = "mnist5k"  # or mnist, cifar10 (TFDS), or a path to your own images
    images: cli.Flat[reading.Images] = reading.Images()
    steps: int | None = 3000
    batch_size: int = 64
    adamw: cli.Flat[optim.AdamW] = optim.AdamW(1e-3, "cosine", b1=0.5, b2=0.99)
    discriminator_rate: Annotated[float, Positive] = 1e-3  # for the rest it is as the generator
    loss: Literal["non-saturating", "hinge", "wasserstein-gp"] = "non-saturating"  # …-gp: 1 critic update an update
    latent: Annotated[int, Positive] = 64  # random numbers that an image is made from
    generator_features: Annotated[tuple[int, ...], Positive] = (64, 32, 16)  # channels, from the smallest grid up
    discriminator_features: Annotated[tuple[int, ...], Positive] = (32, 64)  # channels, each halving the sides
    spectral_norm: bool = True  # divide the discriminator's kernels by their largest singular value
    conditional: bool = True  # the generator is given a class
    ema: float = 0.995
    augmentation: cli.Flat[Augmentation] = Augmentation(shift=1.0, rotate=5.0)
    classifier: Annotated[str | None, tyro.conf.arg(aliases=["--judge"])] = None  # a run of mnist_cnn.py
    eval_every: int = 1000
    save_every: int = 1000


def classifier_of(c: Config) -> Classifier:
    """A finished run of mnist_cnn.py on the same training rows, or one made now."""
    own = f"runs/mnist_gan_classifier_{''.join(filter(str.isalnum, epath.Path(c.data).stem))}{c.images.resize or ''}"
    home = c.classifier or ("runs/mnist_cnn" if (c.data, c.images) == (Config.data, Config.images) else own)
    same = {k: getattr(c, k) for k in ("data", "images", "eval_data", "split_seed")}  # else it may know the test rows
    if not (result := place(home, "--classifier ") / "result.json").exists():
        told = telling(f"the classifier, mnist_cnn.py on {c.data}, in {home}")
        script = runpy.run_path(str(epath.Path(__file__).parents[1] / "vision" / "mnist_cnn.py"))
        config = script["Config"](workdir=home, mesh=c.mesh, compilation_cache=c.compilation_cache, **same)
        experiment = replace(script["build"](config), name="mnist_cnn")
        config = replace(config, batch_size=min(config.batch_size, size_of(experiment.train)))
        train.fit(experiment, config, quiet=True, on_log=told)
    there, wanted = workdir.read_config(home)["config"], {k: v for k, v in asdict(c).items() if k in same}
    if lines := workdir.difference(there, wanted, asdict(Config())):
        raise UsageError(f"the classifier in {home} is of other data ({', '.join(lines)}): give another --classifier")
    return *load(home), json.loads(result.read_text())["metrics"]["eval/accuracy"]


def build(c: Config) -> Experiment:
    data = sources.load(c.data, eval_data=c.eval_data, split_seed=c.split_seed, takes=TAKES, **vars(c.images))
    shared = {"classes": data.classes if c.conditional else 0, "dtype": c.dtype}
    generator = Generator(data.shape("image"), c.latent, c.generator_features, batch_norm=True, **shared)
    shared |= {"pool": "flatten", "spectral_norm": c.spectral_norm, "use_bias": True}
    discriminator = Discriminator(c.discriminator_features, **shared)
    critic = replace(c.adamw, learning_rate=c.discriminator_rate)
    nearest = nearest_training_images(generator, data.train)
    return Experiment(
        task=adversarial(generator, discriminator, loss=c.loss),
        tx=lambda steps: {"discriminator": critic(steps), "generator": c.adamw(steps)},
        train=data.train,
        test=data.test,
        augment=c.augmentation.function(),
        evaluators={"classifier": generated_images(generator, lambda: classifier_of(c), data.test)},
        gallery={"samples": generator_samples(generator), "nearest training images": nearest},
        published=[Published("eval/fid", 21.7, MIYATO, better="lower")] if c.data == "cifar10" else [],
    )


if __name__ == "__main__":
    cli.main(Config, build)
