"""Pictures for the report, made by an experiment at its evaluation steps.

N images, C classes, Z numbers of a code, R rows, S steps.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from bigjax.data import pipeline
from bigjax.experiment import Pictures
from bigjax.look.evaluators import encoder, generate_images, images_of, normal, to_numpy
from bigjax.look.pictures import save_gallery
from bigjax.run import processes
from bigjax.run.shown import Tell, only_shown
from bigjax.run.watch import watching
from bigjax.sharding import to_host
from bigjax.step import to_float
from bigjax.task import Key, ModelState, Params, mode, variables

BATCH = 500


def worst_mistakes(
    model: nn.Module, split: pipeline.Split, *, class_names: Sequence[str] | None = None, count: int = 25
) -> Callable[[Params, ModelState, Key], Pictures]:
    """The wrongly classified images of `split` whose own class got the least probability, the worst first.

    One logit (N, 1) is two classes.
    """

    @to_numpy
    def shares(variables: Any, image: jax.Array) -> jax.Array:
        logits_NC = model.apply(variables, image, **mode(type(model).__call__, False))
        if logits_NC.shape[-1] == 1:  # sigmoid(z) is the softmax of (0, z)
            logits_NC = jnp.concatenate([jnp.zeros_like(logits_NC), logits_NC], axis=-1)
        return jax.nn.softmax(logits_NC)

    def name(label: int) -> str:
        return str(class_names[label] if class_names else label)

    def draw(params: Params, model_state: ModelState, key: Key) -> Pictures:
        found = []
        for batch in pipeline.eval_batches(split, batch_size=min(BATCH, pipeline.size_of(split))):
            image = np.asarray(to_float(batch)["image"])
            share_NC, label_N = shares(variables(params, model_state), image), batch["label"]
            for i in np.flatnonzero((share_NC.argmax(-1) != label_N) & (batch["mask"] > 0)):
                label, guess = int(label_N[i]), int(share_NC[i].argmax())
                found.append((float(share_NC[i, label]), label, guess, float(share_NC[i, guess]), image[i]))
        worst = sorted(found, key=lambda row: row[0])[:count]
        captions = [f"{name(label)}, taken for {name(guess)} ({share:.0%})" for _, label, guess, share, _ in worst]
        images = np.stack([row[-1] for row in worst]) if worst else np.zeros((0, 1, 1))
        return Pictures(images, captions, columns=5)

    return draw


Draw = Callable[[Params, ModelState, Key], Pictures]


def pairs(above: np.ndarray, below: np.ndarray) -> Pictures:
    """Rows of ten images, and under each row those that belong to it; what is missing in the last is black."""
    blank = [(0, -len(above) % 10)] + [(0, 0)] * (above.ndim - 1)
    rows = [np.pad(x, blank).reshape(-1, 10, *x.shape[1:]) for x in (above, below)]
    return Pictures(np.stack(rows, 1).reshape(-1, *above.shape[1:]), columns=10)


def decoder(model: nn.Module) -> Callable[[Any, np.ndarray], np.ndarray]:
    """(variables, codes (N, Z)) -> images in [0, 1] (N, H, W, C)."""
    return to_numpy(lambda variables, code: jax.nn.sigmoid(model.apply(variables, code, method="decode")))


def reconstructions(model: nn.Module, split: pipeline.Split, *, count: int = 20) -> Draw:
    """Pairs of rows: images of `split`, and below them what an autoencoder's code gives back."""
    images, encode, decode = images_of(split, count), to_numpy(encoder(model)), decoder(model)

    def draw(params: Params, model_state: ModelState, key: Key) -> Pictures:
        mine = variables(params, model_state)
        return pairs(images, decode(mine, encode(mine, images)))

    return draw


def prior_samples(model: nn.Module, *, count: int = 100) -> Draw:
    """Images that a VAE decodes from its prior N(0, 1)."""
    decode = decoder(model)

    def draw(params: Params, model_state: ModelState, key: Key) -> Pictures:
        code_NZ = normal(key, (count, model.code))
        return Pictures(decode(variables(params, model_state), code_NZ), columns=10)

    return draw


def latent_walk(model: nn.Module, split: pipeline.Split, *, rows: int = 5, steps: int = 10) -> Draw:
    """Each row walks in a straight line between the codes of two images of `split`."""
    images, encode, decode = images_of(split, 2 * rows), to_numpy(encoder(model)), decoder(model)
    rows = len(images) // 2

    def draw(params: Params, model_state: ModelState, key: Key) -> Pictures:
        mine = variables(params, model_state)
        code_NZ = encode(mine, images)
        line_RSZ = np.linspace(code_NZ[:rows], code_NZ[rows : 2 * rows], steps, axis=1)
        return Pictures(decode(mine, line_RSZ.reshape(rows * steps, -1)), columns=steps)

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


def text_sample(
    model: nn.Module,
    prompt: Sequence[int],
    *,
    speak: Callable[[np.ndarray], str],
    length: int = 400,
    temperature: float = 0.8,
) -> Callable[[Params, ModelState, Key], str]:
    """What a language model writes after `prompt`, the prompt included, as far as its context goes.

    speak: tokens -> text.
    """
    from bigjax.use.generate import generate

    prompt_BL = np.asarray(prompt, np.int32)[None, : max(1, model.context // 2)]
    length = min(length, model.context - prompt_BL.shape[1])

    def write(params: Params, model_state: ModelState, key: Key) -> str:
        mine = variables(params, model_state)
        with jax.transfer_guard("allow"):  # of the prompt and the temperature
            new = generate(model, mine, prompt_BL, length=length, key=key, temperature=temperature)
        return speak(np.concatenate([prompt_BL[0], to_host(new.tokens_RN)[0]]))

    return write


def speaker(tokenizer: str | None, *, known: bool = True) -> Callable[[np.ndarray], str]:
    """Tokens as text: by the tokenizer.json at a path; without one as bytes, or, not even `known`, as numbers."""
    if tokenizer is None:
        return lambda ids: bytes(ids.astype(np.uint8)).decode("utf-8", "replace") if known else " ".join(map(str, ids))
    from bigjax.data.text import load_tokenizer

    coder = load_tokenizer(tokenizer)
    return lambda ids: coder.decode(ids.tolist(), skip_special_tokens=False)


def draw(program: Any, home: epath.Path, state: Any, step: int, tell: Tell) -> None:
    """The gallery of an experiment, by all processes; the first keeps it.

    What fails in all is told; in one alone it would leave the others waiting in a collective: that ends the run.
    """
    for name, picture in program.experiment.gallery.items():
        item, wrong = None, None
        try:
            with watching(f"the gallery {name!r}", f"gallery {name}"):
                item = picture(*state.evaluated(), program.key)
        except Exception as e:
            wrong = e
        processes.fail_together(f"gallery {name!r}", wrong)
        with only_shown(f"gallery {name!r}", tell):
            if wrong:
                raise wrong
            if processes.first():
                save_gallery(home, step, name=name, item=item)
