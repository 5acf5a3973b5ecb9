"""`petal quantize MODEL`: make a quantized checkpoint of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Hub id, local safetensors folder, GGUF file, or [b]demo[/b].")],
    format: Annotated[str, typer.Option(help="[b]aqlm[/b] (2 bits), [b]spqr[/b] (3 to 5) or [b]int4[/b].")],
    calibration: Annotated[Path, typer.Option(help="Text like that which the model will see, in UTF-8.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; after a kill, the same goes on.")],
    device: Annotated[str | None, typer.Option(help="Where to compute; by default a GPU where there is one.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to use.")] = 131072,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a row.")] = 1024,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same checkpoint.")] = 0,
) -> None:
    """Quantize MODEL block by block against a text, and say what it cost."""
    console = Console(stderr=True)
    try:
        import torch

        from ...protocol.checkpoint.layout import CheckpointError
        from .run import Options
        from .run import quantize as run
    except ImportError as error:
        _fail(console, f"quantizing needs torch and transformers: pip install 'petal-swarm[models]' ({error})", error)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's ways to say that there is no such device
        raise typer.BadParameter(f"this machine cannot compute on {device!r}: give cpu or cuda") from error
    try:
        run(Options(model, format, calibration, out, device, tokens, length, seed), console)
    except (CheckpointError, OSError, torch.OutOfMemoryError) as error:
        _fail(console, str(error), error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _fail(console: Console, text: str, error: Exception) -> None:
    # What is in an error is never markup, and a line is a line however narrow the terminal is.
    console.print(f"[red]petal quantize:[/red] {escape(text)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1) from error


def main() -> None:
    app(prog_name="petal quantize")
