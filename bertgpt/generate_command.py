"""`bertgpt generate`: continues a prompt, text as it comes or token ids."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

_DEFAULT_NEW_TOKENS = 64


def _option(help: str, **limits: Any) -> Any:
    return typer.Option(help=help, **limits)


def generate(
    model: Annotated[
        Path,
        typer.Argument(exists=True, file_okay=False, help="Folder of a GPT checkpoint."),
    ],
    prompt: Annotated[str | None, _option("Text to continue; needs a tokenizer.")] = None,
    prompt_ids: Annotated[str | None, _option("Token ids to continue, as 1,2,3.")] = None,
    max_new_tokens: Annotated[
        int | None,
        _option(
            f"Tokens to add at most; by default {_DEFAULT_NEW_TOKENS}, or what there is room for.",
            min=1,
        ),
    ] = None,
    stop_token: Annotated[
        list[int] | None, _option("Id to stop at, repeatable; by default the config's.")
    ] = None,
    stop_string: Annotated[list[str] | None, _option("Text to stop after, repeatable.")] = None,
    do_sample: Annotated[bool, _option("Draw each token; by default the likeliest.")] = False,
    temperature: Annotated[float, _option("Divides the scores.")] = 1.0,
    top_k: Annotated[int, _option("Keep so many likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, _option("Keep the likeliest tokens of this share.")] = 1.0,
    min_p: Annotated[float, _option("Keep tokens this times as likely as the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, _option("Above 1, makes what was said unlikely.")] = 1.0,
    seed: Annotated[int | None, _option("Of the draws; by default another each time.")] = None,
    num_return_sequences: Annotated[int, _option("Texts, one a line or block.", min=1)] = 1,
    num_beams: Annotated[int, _option("Beam search over so many texts.", min=1)] = 1,
    length_penalty: Annotated[float, _option("Of beam search; above 1 for longer texts.")] = 1.0,
    early_stopping: Annotated[bool, _option("End when all beams have ended.")] = False,
    device: Annotated[str | None, _option("Such as cpu or cuda; by default a GPU if any.")] = None,
) -> None:
    """Continue a prompt on a paged KV cache: prints text as it comes for text, ids for ids."""
    if (prompt is None) == (prompt_ids is None):
        raise typer.BadParameter("give one of --prompt and --prompt-ids")
    if stop_string and prompt is None:
        raise typer.BadParameter("--stop-string goes with --prompt")
    from bertgpt.auto import load_language_model
    from bertgpt.cli import as_device
    from bertgpt.sampling import SamplingOptions
    from bertgpt.text import load_tokenizer

    sampling = SamplingOptions(
        do_sample, temperature, top_k, top_p, min_p, repetition_penalty, seed
    )
    tokenizer = None if prompt is None else load_tokenizer(model)
    ids = _parse_ids(prompt_ids) if tokenizer is None else tokenizer.encode(prompt).ids
    if not ids:
        raise ValueError("the prompt holds no token: give it some text")
    gpt = load_language_model(model).to(as_device(device))
    if max_new_tokens is None:
        room = gpt.config.max_position_embeddings - len(ids)
        max_new_tokens = max(1, min(_DEFAULT_NEW_TOKENS, room))
    job: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": stop_token,
        "stop_strings": stop_string,
        "tokenizer": tokenizer,
        "seed": secrets.randbits(64) if do_sample and seed is None else seed,
        "num_return_sequences": num_return_sequences,
    }
    if num_beams > 1 or num_return_sequences > 1:
        beams = {"num_beams": num_beams, "length_penalty": length_penalty}
        texts = gpt.generate(
            [ids], **job, **beams, early_stopping=early_stopping, **_but_seed(sampling)
        )
        for text in texts:
            typer.echo(_join(text) if tokenizer is None else tokenizer.decode(text))
        return
    if length_penalty != 1.0 or early_stopping:
        raise typer.BadParameter("--length-penalty and --early-stopping go with --num-beams")
    new = (token.token for token in gpt.stream([ids], sampling=sampling, **job))
    for piece in _id_pieces(ids, new) if tokenizer is None else _text_pieces(tokenizer, ids, new):
        typer.echo(piece, nl=False)
    typer.echo()


def _but_seed(sampling: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(sampling).items() if name != "seed"}


def _join(ids: Iterable[int]) -> str:
    return ",".join(map(str, ids))


def _id_pieces(ids: list[int], new: Iterator[int]) -> Iterator[str]:
    yield _join(ids)
    for token in new:
        yield f",{token}"


def _text_pieces(tokenizer: Any, ids: list[int], new: Iterator[int]) -> Iterator[str]:
    """The prompt's text, then what each token adds to it."""
    from bertgpt.text import TextStream

    stream = TextStream(tokenizer, ids)
    yield tokenizer.decode(ids)
    for token in new:
        yield stream.push(token)
    yield stream.pending


def _parse_ids(text: str | None) -> list[int]:
    try:
        return [int(part) for part in (text or "").split(",")]
    except ValueError:
        message = f"{text!r} is no list of token ids such as 1,2,3"
        raise typer.BadParameter(message, param_hint="--prompt-ids") from None
