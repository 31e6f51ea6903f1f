"""The program: global options, errors in one line, exit codes."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from . import commands

RESUMABLE = ("distill", "search-length")


class _Group(TyperGroup):
    """Turns what a command raises into one line and an exit code; `--debug` lets it through."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            resume = "; to resume, run the same command again" if ctx.invoked_subcommand in RESUMABLE else ""
            typer.echo(f"interrupted{resume}", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            # What typer itself raises (wrong usage, a wanted exit) carries its exit code.
            if ctx.params["debug"] or hasattr(error, "exit_code") or isinstance(error, typer.Abort):
                raise
            typer.echo(f"error: {_line(error)}", err=True)
            raise typer.Exit(1) from error


class _Stderr(logging.Handler):
    """Writes to what sys.stderr is now."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=True)


app = typer.Typer(
    name="lowbit",
    cls=_Group,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,  # with --debug: Python's own traceback
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lowbit {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """BERT in 2-bit and 1-bit weights: quantize, train, look into and time checkpoints."""
    logger = logging.getLogger("lowbit")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())


for _function in commands.COMMANDS:
    app.command(_function.__name__.replace("_", "-"), no_args_is_help=_function is not commands.doctor)(_function)


def _line(error: Exception) -> str:
    """The message in one line; the kind of error where it is none of those that are made to be read."""
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | TypeError | OSError | ImportError | RuntimeError) and text:
        return text
    return f"{type(error).__name__}: {text} (lowbit --debug shows where)"
