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
            if isinstance(error, typer.Exit | typer.Abort) or ctx.params["debug"]:
                raise
            wrong_usage = hasattr(error, "format_message")  # typer's own
            typer.echo(f"error: {_usage(ctx, error) if wrong_usage else _line(error)}", err=True)
            raise typer.Exit(2 if wrong_usage else 1) from error


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
    app.command(_function.__name__.replace("_", "-"))(_function)


def _usage(ctx: Any, error: Any) -> str:
    command = f"lowbit {ctx.invoked_subcommand}" if ctx.invoked_subcommand in ctx.command.commands else "lowbit"
    return f"{' '.join(error.format_message().split())} ({command} --help)"


def _line(error: Exception) -> str:
    """The message in one line; the kind of error where it is none of those that are made to be read."""
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | TypeError | OSError | ImportError | RuntimeError) and text:
        return text
    return f"{type(error).__name__}: {text} (lowbit --debug shows where)"
