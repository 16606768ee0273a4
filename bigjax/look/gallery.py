"""Pictures for the report, made by an experiment at its evaluation steps.

N images, C classes.
"""

from collections.abc import Callable, Iterator, Sequence

import flax.linen as nn
import jax
import numpy as np

from bigjax.data import pipeline
from bigjax.experiment import Pictures
from bigjax.look.evaluators import generate_images, images_of
from bigjax.models import autoencoder
from bigjax.step import to_float
from bigjax.task import Batch, Key, ModelState, Params

BATCH = 500


def in_order(split: pipeline.Split) -> Iterator[tuple[Batch, int]]:
    """Batches of a split for a look at each example: (batch, real rows)."""
    for batch in pipeline.eval_batches(split, batch_size=min(BATCH, pipeline.size_of(split))):
        yield to_float(jax.tree.map(jax.numpy.asarray, batch)), int(batch["mask"].sum())


def worst_mistakes(
    model: nn.Module, split: pipeline.Split, *, class_names: Sequence[str] | None = None, count: int = 25
) -> Callable[[Params, ModelState, Key], Pictures]:
    """The wrongly classified images of `split` whose own class got the least probability, the worst first."""
    logits = jax.jit(lambda variables, image: jax.nn.softmax(model.apply(variables, image, train=False)))

    def draw(params: Params, model_state: ModelState, key: Key) -> Pictures:
        variables, found = {"params": params["model"], **model_state["model"]}, []
        for batch, real in in_order(split):
            share_NC, label_N = np.asarray(logits(variables, batch["image"])), np.asarray(batch["label"])
            for i in np.flatnonzero(share_NC.argmax(-1) != label_N):
                if i < real:
                    guess = int(share_NC[i].argmax())
                    own = float(share_NC[i, label_N[i]])
                    found.append(
                        (own, int(label_N[i]), guess, float(share_NC[i, guess]), np.asarray(batch["image"][i]))
                    )
        worst = sorted(found, key=lambda row: row[0])[:count]
        name = class_names or [str(c) for c in range(10**3)]
        captions = [f"{name[label]}, taken for {name[guess]} ({share:.0%})" for _, label, guess, share, _ in worst]
        images = np.stack([row[-1] for row in worst]) if worst else np.zeros((0, 1, 1))
        return Pictures(images, captions, columns=5)

    return draw


Draw = Callable[[Params, ModelState, Key], Pictures]


def pairs(above: np.ndarray, below: np.ndarray) -> Pictures:
    """Rows of ten images, and under each row those that belong to it; what is missing in the last is black."""
    blank = [(0, -len(above) % 10)] + [(0, 0)] * (above.ndim - 1)
    rows = [np.pad(x, blank).reshape(-1, 10, *x.shape[1:]) for x in (above, below)]
    return Pictures(np.stack(rows, 1).reshape(-1, *above.shape[1:]), columns=10)


def reconstructions(model: nn.Module, split: pipeline.Split, *, count: int = 20) -> Draw:
    """Pairs of rows: images of `split`, and below them what an autoencoder's code gives back."""
    images = images_of(split, count)

    def draw(params: Params, model_state: ModelState, key: Key) -> Pictures:
        variables = {"params": params["model"], **model_state["model"]}
        code = model.apply(variables, images, method="encode")
        code = code[0] if isinstance(code, tuple) else code  # a VAE's mean
        back = np.asarray(jax.nn.sigmoid(model.apply(variables, code, method="decode")))
        return pairs(images, back)

    return draw


def prior_samples(model: nn.Module, *, count: int = 100) -> Draw:
    """Images that a VAE decodes from its prior."""

    def draw(params: Params, model_state: ModelState, key: Key) -> Pictures:
        variables = {"params": params["model"], **model_state["model"]}
        return Pictures(np.asarray(autoencoder.sample(model, variables, key, count)), columns=10)

    return draw


def latent_walk(model: nn.Module, split: pipeline.Split, *, rows: int = 5, steps: int = 10) -> Draw:
    """Each row walks in a straight line between the codes of two images of `split`."""
    images = images_of(split, 2 * rows)
    rows = len(images) // 2

    def draw(params: Params, model_state: ModelState, key: Key) -> Pictures:
        variables = {"params": params["model"], **model_state["model"]}
        walk = autoencoder.interpolate(model, variables, images[:rows], images[rows : 2 * rows], steps)
        walk = np.asarray(walk).swapaxes(0, 1)
        return Pictures(walk.reshape(-1, *walk.shape[2:]), columns=steps)

    return draw


def generator_samples(generator: nn.Module, *, count: int = 100) -> Draw:
    """Images of the player "generator", a class a column if it is conditioned."""

    columns = 10 - 10 % generator.classes if 0 < generator.classes <= 10 else 10

    def draw(params: Params, model_state: ModelState, key: Key) -> Pictures:
        return Pictures(generate_images(generator, params, model_state, key, count), columns=columns)

    return draw


def nearest_training_images(generator: nn.Module, train: pipeline.Split, *, count: int = 20) -> Draw:
    """Pairs of rows: samples, and below them the training image nearest to each in pixels (is it learnt by heart?)."""
    images = images_of(train, 10_000)
    flat_ND = images.reshape(len(images), -1)

    def draw(params: Params, model_state: ModelState, key: Key) -> Pictures:
        fake = generate_images(generator, params, model_state, key, count)
        near = [images[np.square(flat_ND - f.reshape(1, -1)).sum(1).argmin()] for f in fake]
        return pairs(fake, np.stack(near))

    return draw
