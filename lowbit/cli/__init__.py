"""The command line: `lowbit COMMAND`, or `python -m lowbit COMMAND`.

app          the program: global options, errors, exit codes
commands/    one function a command: its arguments, and what it prints
loading      checkpoints by name: the model, its labels, its tokenizer; saving what was made of it
folders      where the files of a checkpoint are
weights      the files of its weights
architectures  the class of a float model whose config.json names none
copying      what is beside a model, and goes along with one made from it
checkpoint   what is in a checkpoint, for `lowbit info`
doctor       what is on this machine, for `lowbit doctor`

Exit codes: 0 done, 1 the run failed, 2 wrong usage, 130 interrupted. What people read goes to stdout, progress and
errors to stderr; with --json stdout holds one JSON object and nothing else. torch and transformers are imported by the
commands that need them, so that `--help` and completion answer at once.
"""

from __future__ import annotations


def main() -> None:
    """Entry point of the `lowbit` program."""
    from .app import app

    app(prog_name="lowbit")
