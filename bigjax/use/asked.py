"""What is to be generated: checked, and put on the device.

B prompts, L tokens of a prompt, R rows that are written, S stop tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax import Array

from bigjax import UsageError
from bigjax.sharding import everywhere, our_mesh

LEAST = 16  # tokens that a prompt is padded to at least


class Job(NamedTuple):
    """What is asked, checked and on the device. options: those that are in use, traced; the others are compiled in.

    position: of the first new token, () where it is the same in all rows, else (B,). size: of the cache.
    """

    model: nn.Module
    variables: Any
    prompt_BL: Array
    length_B: Array
    position: Array
    key: Array | None
    options: dict[str, Array]
    length: int
    size: int
    top_k: int | None
    beams: int
    returned: int


def asked(
    model: nn.Module,
    variables: Any,
    prompt_BL: Any,
    *,
    length: int,
    key: Array | None = None,
    length_B: Any = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: int | Sequence[int] | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    returned: int = 1,
    start: int = 0,
) -> Job:
    """The job that `generate` is to do; UsageError where it can't be done."""
    wholes = {"length": length, "top_k": top_k, "beams": beams, "returned": returned, "start": start}
    reals = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "length_penalty": length_penalty}
    check_kinds(wholes, reals | {"repetition_penalty": repetition_penalty}, key, stop)
    prompt_BL, length_B = jax.device_get((prompt_BL, length_B))
    prompt_BL = np.asarray(prompt_BL)
    reads = hasattr(model, "encode")
    context = check_prompts(model, prompt_BL, length_B, length=length)
    for wrong, said in (
        (not temperature >= 0, f"temperature {temperature}: give 0, which takes the likeliest, or more"),
        (top_k is not None and top_k < 1, f"top_k {top_k}: give at least 1"),
        (top_p is not None and not 0 < top_p <= 1, f"top_p {top_p}: give a share above 0, up to 1"),
        (min_p is not None and not 0 <= min_p <= 1, f"min_p {min_p}: give a share from 0 to 1"),
        (not repetition_penalty > 0, f"repetition_penalty {repetition_penalty}: give more than 0; 1 is none"),
        (beams < 1, f"beams {beams}: give at least 1"),
        (returned < 1, f"returned {returned}: give at least 1"),
    ):
        if wrong:
            raise UsageError(said)
    drawn = {"temperature": None if temperature in (0, 1) else temperature, "top_k": top_k, "top_p": top_p}
    drawn = [f"{k} {v}" for k, v in (drawn | {"min_p": min_p}).items() if v is not None]
    if (beams > 1 or temperature == 0) and drawn:
        greedy = f"{beams} beams draw" if beams > 1 else "temperature 0 draws"
        raise UsageError(f"{greedy} nothing, and {drawn[0]} is of draws: leave one of the two out")
    if beams * getattr(model, "vocabulary", 1) >= 2**31:
        raise UsageError(f"{beams} beams of {model.vocabulary} tokens are too many to compare: give fewer")
    if beams > 1 and returned > beams:
        raise UsageError(f"returned {returned} of {beams} beams: ask for no more than there are")
    if beams == 1 and returned > 1 and temperature == 0:
        raise UsageError(
            f"returned {returned} at temperature 0: all would be the same, so raise one or lower the other"
        )
    if beams == 1 and temperature > 0 and key is None:
        raise UsageError(f"temperature {temperature} draws tokens: give key=jax.random.key(0), or temperature=0")
    B, L = prompt_BL.shape
    length_B = np.full(B, L, np.int32) if length_B is None else np.asarray(length_B).astype(np.int32)
    L = int(length_B.max(initial=1))
    padded = max(LEAST, 1 << (L - 1).bit_length())
    size = length + 1 if reads else min(padded + length, context or padded + length)
    padded = padded if reads else min(padded, size)
    same = reads or (length_B == length_B[:1]).all()
    position = np.int32(1) if reads else np.int32(L) if same else np.repeat(length_B, returned)
    stops = () if stop is None else (stop,) if isinstance(stop, int | np.integer) else tuple(stop)
    room = 1 << max(len(stops) - 1, 0).bit_length()  # for so many, so that other stop tokens compile nothing
    options = {
        "stop_S": np.array([*stops, *[-1] * (room - len(stops))], np.int32),
        "pad": np.int32(stops[0] if stops else 0),
        "start": np.int32(start),
        "temperature": None if temperature == 0 or beams > 1 else np.float32(temperature),
        "top_p": None if top_p is None else np.float32(top_p),
        "min_p": None if min_p is None else np.float32(min_p),
        "penalty": None if repetition_penalty == 1 else np.float32(repetition_penalty),
        "length_penalty": None if beams == 1 else np.float32(length_penalty),
    }
    # Traced unless they change the program, so that trying another temperature, p or stop token compiles nothing.
    options = {k: v for k, v in options.items() if v is not None}
    prompt_BL = np.pad(prompt_BL[:, :L].astype(np.int32), ((0, 0), (0, padded - L)))
    prompt_BL, length_B, position, options, key = put((prompt_BL, length_B, position, options, key))
    return Job(model, variables, prompt_BL, length_B, position, key, options, length, size, top_k, beams, returned)


def check_kinds(wholes: dict[str, Any], reals: dict[str, Any], key: Any, stop: Any) -> None:
    """UsageError for an option that is no number where one is wanted, or no whole one, or no key."""
    for name, value in wholes.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer)):
            raise UsageError(f"{name} {value!r}: give a whole number")
    for name, value in reals.items():
        kind = int | float | np.integer | np.floating
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind) or not np.isfinite(value)):
            raise UsageError(f"{name} {value!r}: give a finite number of Python's")
    new = isinstance(key, Array) and key.shape == () and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not (key is None or new or (isinstance(key, Array) and (key.shape, key.dtype) == ((2,), np.uint32))):
        raise UsageError(f"key {key!r} is no key: give key=jax.random.key(0)")
    stops = stop if isinstance(stop, Sequence) and not isinstance(stop, str) else () if stop is None else (stop,)
    if odd := [s for s in stops if isinstance(s, bool) or not isinstance(s, int | np.integer)]:
        raise UsageError(f"stop {odd[0]!r} is no token: give whole numbers, or texts as stop_strings of complete")


def put(tree: Any) -> Any:
    """On the device, or on all of the mesh that is set."""
    return jax.device_put(tree, everywhere(jax.sharding.get_mesh()) if our_mesh() else None)


def check_prompts(model: nn.Module, prompt_BL: np.ndarray, length_B: np.ndarray | None, *, length: int) -> int | None:
    """The model's context, if it has one; UsageError where it can't go on with these prompts for so long."""
    name, context = type(model).__name__, getattr(model, "context", None)
    context = None if hasattr(model, "encode") else context
    if not hasattr(model, "empty_cache"):
        raise UsageError(f"{name} writes no text: give a model of the next token (GPT, Gemma, Mixtral), or T5")
    if prompt_BL.ndim != 2 or not np.issubdtype(prompt_BL.dtype, np.integer):
        got = f"{prompt_BL.dtype}{list(prompt_BL.shape)}"
        raise UsageError(f"prompts are rows of integer tokens (batch, length), not {got}: give such")
    B, L = prompt_BL.shape
    whole = length_B is None or np.issubdtype(np.asarray(length_B).dtype, np.integer)
    if not whole or (length_B is not None and (np.shape(length_B) != (B,) or np.max(length_B, initial=0) > L)):
        raise UsageError(f"length_B says how many tokens are real of {B} prompts with room for {L}, not {length_B}")
    real = L if length_B is None else np.min(length_B, initial=L)
    if real < 1:
        raise UsageError("a prompt is empty: give each at least one token")
    if length < 1:
        raise UsageError(f"length {length}: ask for at least 1 token")
    most = L if length_B is None else int(np.max(length_B, initial=0))
    if context is not None and most + length > context:
        raise UsageError(
            f"a prompt of {most} tokens and length {length} are more than the model's context ({context}): shorten one"
        )
    if (least := prompt_BL.min(initial=0)) < 0 or prompt_BL.max(initial=0) >= model.vocabulary:
        token = least if least < 0 else prompt_BL.max()
        raise UsageError(
            f"a prompt holds token {token}, and the model's vocabulary is {model.vocabulary}: use the tokenizer that "
            "the model was trained with"
        )
    return context
