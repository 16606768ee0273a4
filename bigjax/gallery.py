"""Pictures for the report, made by an experiment at its evaluation steps.

N images, C classes.
"""

from collections.abc import Callable, Iterator, Sequence

import flax.linen as nn
import jax
import numpy as np

from bigjax.data import pipeline
from bigjax.experiment import Pictures
from bigjax.step import to_float
from bigjax.tasks import Batch, Key, ModelState, Params

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
                    found.append((own, int(label_N[i]), guess, float(share_NC[i, guess]), np.asarray(batch["image"][i])))
        worst = sorted(found, key=lambda row: row[0])[:count]
        name = class_names or [str(c) for c in range(10**3)]
        captions = [f"{name[label]}, taken for {name[guess]} ({share:.0%})" for _, label, guess, share, _ in worst]
        images = np.stack([row[-1] for row in worst]) if worst else np.zeros((0, 1, 1))
        return Pictures(images, captions, columns=5)

    return draw
