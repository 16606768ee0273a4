"""The verb sample: what a run's model, or a pretrained one, writes."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import tyro

from bigjax import UsageError, place

Several = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True)
class Options:
    """Write on from a prompt, with the model of a run or a pretrained one."""

    prompt: Several = ()  # what to go on with; given several times, each by itself
    length: int | None = None  # tokens at most; 100, or for which the context has room
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int | None = None  # among so many likeliest
    top_p: float | None = None  # among the fewest that have this share of the probability together
    min_p: float | None = None  # among those at least this share as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: what was there already becomes less likely
    beams: int = 1  # search for the likeliest text with so many, in place of drawing
    seed: int = 0  # of what is drawn
    stop: Several = ()  # text to stop before; may be given several times
    chat: bool = False  # talk with it, by its chat template; --prompt is then what is said
    tokenizer: str | None = None  # where the folder has none: bytes, or a folder with tokenizer.json


@dataclass(frozen=True)
class Sample(Options):
    """Write on from a prompt, with the model of a run or a pretrained one."""

    folder: tyro.conf.Positional[str] = ""  # a run's; or one with config.json and safetensors; or a hub id, owner/name


@dataclass(frozen=True)
class OfScript(Options):
    """Write on from a prompt, with the model of a run of this script."""

    workdir: str | None = None  # of the run; default: runs/NAME


def of_script(arguments: Sequence[str], *, name: str, **about: str) -> None:
    """The verb of an experiment's script."""
    asked = tyro.cli(OfScript, args=arguments, **about)
    sample(f"runs/{name}" if asked.workdir is None else asked.workdir, asked)


def sample(folder: str, asked: Options) -> None:
    """Prints what is written after each prompt, with it, while it is written; of a T5 without; or talks."""
    from bigjax.run import machine

    if not folder:
        raise UsageError("no folder is given: name that of a run, or of a pretrained model")
    if not asked.prompt and not asked.chat:
        raise UsageError('there is nothing to go on with: give --prompt "…", or --chat')
    if asked.beams > 1 and asked.chat:
        raise UsageError(f"--beams {asked.beams} have no text before they end, and --chat shows it: leave one out")
    if asked.beams > 1 and asked.seed:
        raise UsageError(f"--beams {asked.beams} draw nothing, and --seed is of draws: leave one of the two out")
    machine.cache_compilations(True)
    model, variables, tokenizer = opened(folder, asked.tokenizer)
    names = ("length", "top_k", "top_p", "min_p", "repetition_penalty", "beams")
    options = {k: getattr(asked, k) for k in names} | {"stop_strings": asked.stop}
    if asked.beams == 1:
        options |= {"temperature": asked.temperature, "key": jax.random.key(asked.seed)}
    elif asked.temperature != Options.temperature:
        options |= {"temperature": asked.temperature}
    options |= stop_tokens(folder)
    from bigjax.use import text

    if asked.chat:
        return talk(model, variables, tokenizer, asked.prompt, options)
    shown = [""] * len(asked.prompt) if hasattr(model, "encode") else asked.prompt  # which another text follows
    if len(asked.prompt) == 1 and asked.beams == 1:
        show(shown[0], text.stream(model, variables, tokenizer, asked.prompt[0], **options))
        return
    for prompt, more in zip(shown, text.complete(model, variables, tokenizer, asked.prompt, **options)):
        show(prompt, iter([more]))


def show(prompt: str, pieces: Iterator[str]) -> str:
    """Prints a prompt and what comes after it; gives that back."""
    made = ""
    for piece in pieces:
        print(prompt if not made else "", piece, sep="", end="", flush=True)
        made += piece
    print(prompt if not made else "", flush=True)
    return made


def talk(model: nn.Module, variables: Any, tokenizer: Any, said: Sequence[str], options: dict[str, Any]) -> None:
    """Answers what is said, or else what is typed until there is no more."""
    from bigjax.use import text

    messages: list[dict[str, str]] = []
    if getattr(tokenizer, "template", None) is None:
        tokenizer.chat([])  # says so, before anything is typed
    for n, line in enumerate(iter(said) if said else typed()):
        messages.append({"role": "user", "content": line})
        prompt = tokenizer.chat(messages)
        key = {"key": jax.random.fold_in(options["key"], n)}
        answer = show("", text.stream(model, variables, tokenizer, prompt, special=False, **options | key))
        messages.append({"role": "assistant", "content": answer})


def typed() -> Iterator[str]:
    """Lines from the terminal, up to the end (Ctrl-D)."""
    shown = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(shown)
        except EOFError:
            return
        if line.strip():
            yield line


def opened(folder: str, tokenizer: str | None = None) -> tuple[nn.Module, Any, Any]:
    """(model, variables, tokenizer) of a run's folder or a pretrained one; UsageError where one of them is missing."""
    from bigjax import pretrained
    from bigjax.run import restore
    from bigjax.use import text

    record = record_of(folder)
    if record is None:
        coder = tokenizer_of(tokenizer) if tokenizer else pretrained.tokenizer(folder)
        model, variables = pretrained.load(folder)
    else:
        player = writer(record["models"], folder)
        coder = tokenizer_of(tokenizer) if tokenizer else tokenizer_of_run(folder, record)
        model, variables = restore.load(folder, player=player)
    if hasattr(model, "empty_cache"):
        text.fits(coder.size, model.vocabulary)
    return model, variables, coder


def record_of(folder: str) -> dict[str, Any] | None:
    """config.json of a run; None of what is none."""
    path = place(folder) / "config.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"experiment", "models"} <= record.keys() else None


def writer(models: dict[str, Any], folder: str) -> str:
    """The player of a run that writes."""
    from bigjax.run.modules import module_from

    made = {player: module_from(spec) for player, spec in models.items()}
    if found := [player for player, model in made.items() if hasattr(model, "empty_cache")]:
        return found[0]
    names = ", ".join(type(model).__name__ for model in made.values())
    raise UsageError(f"{folder} holds {names}, which writes no text: name a run of a GPT, Gemma, Mixtral or T5")


def tokenizer_of(name: Any) -> Any:
    """`bytes`; characters, as a list; or a folder with tokenizer.json."""
    from bigjax import pretrained
    from bigjax.use.text import Letters

    if name == "bytes" or isinstance(name, list):
        return Letters(None if name == "bytes" else name)
    return pretrained.tokenizer(name)


def tokenizer_of_run(folder: str, record: dict[str, Any]) -> Any:
    """What the run has kept."""
    kept = record.get("tokenizer")
    if kept is None:
        raise UsageError(
            f"{folder} does not say what its tokens are: give --tokenizer bytes, or a folder with its tokenizer.json"
        )
    return tokenizer_of(kept if kept == "bytes" or isinstance(kept, list) else place(folder) / "tokenizer")


def stop_tokens(folder: str) -> dict[str, Any]:
    """The stop tokens of generation_config.json, where a folder has that."""
    path = place(folder) / "generation_config.json"
    try:
        stop = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    except (ValueError, AttributeError):
        raise UsageError(f"{path} cannot be read: fetch it again, or take it away") from None
    return {} if stop is None else {"stop": tuple(stop) if isinstance(stop, list) else stop}
