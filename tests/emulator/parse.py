"""PTX text to instructions.

Operands stay text, but for `{%r1, %r2}`, a tuple of them, and `[%rd1 + 16]`, an `Address`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Address:
    """base + offset in bytes; base is a register, a parameter or a symbol."""

    base: str
    offset: int


Operand = str | tuple[str, ...] | Address


@dataclass(frozen=True)
class Instruction:
    """One statement: `@!%p1 ld.global.b32 %r1, [%rd1];`."""

    opcode: str
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool  # runs where the predicate is false
    line: int  # of the PTX, from 1

    @property
    def parts(self) -> list[str]:
        """The opcode and its modifiers."""
        return self.opcode.split(".")

    def __str__(self) -> str:
        return f"{self.opcode} (line {self.line})"


@dataclass(frozen=True)
class Program:
    """One kernel."""

    name: str
    parameters: dict[str, str]  # name -> PTX type, in order
    threads: int
    registers: dict[str, str]  # names, or names before their number -> PTX type
    instructions: list[Instruction]
    labels: dict[str, int]  # label -> index of the instruction that follows it


_DIRECTIVES = (".loc", ".pragma", ".file", ".section")
_LABEL = re.compile(r"^([$%A-Za-z_][\w$]*):")
_PREDICATED = re.compile(r"^@(!?)([%\w]+)\s+(.*)$")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_ADDRESS = re.compile(r"^([%$\w]+)\s*(?:\+\s*(-?\w+))?$")


def parse(ptx: str) -> Program:
    """The kernel of a PTX text, which has to hold exactly one.

    Raises:
        ValueError: no kernel or several, or no fixed number of threads (`.reqntid`).
    """
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)", ptx))
    if len(entries) != 1:
        raise ValueError(f"the PTX holds {len(entries)} kernels, accepted: one")
    entry = entries[0]
    parameters = {}
    for declaration in filter(None, (part.strip() for part in entry[2].split(","))):
        words = declaration.split()
        parameters[words[-1]] = words[1].lstrip(".")
    threads = re.search(r"\.reqntid\s+(\d+)", ptx)
    if threads is None:
        raise ValueError("the PTX has no .reqntid: the number of threads is not known")
    registers: dict[str, str] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    start = ptx.index("{", entry.end())
    first_line = ptx.count("\n", 0, start) + 1
    for number, line in enumerate(ptx[start + 1 : ptx.index("\n}", start)].split("\n"), first_line):
        text = line.split("//")[0].strip()
        if found := _LABEL.match(text):
            labels[found[1]] = len(instructions)
            text = text[found.end() :].strip()
        for statement in text.split(";"):
            statement = re.sub(r"^(\{\s+|\{$|\}\s*)+", "", statement.strip())  # braces around inline assembly
            if statement.startswith(".reg"):
                _, kind, names = statement.split(None, 2)
                registers |= {name.split("<")[0].strip(): kind[1:] for name in names.split(",")}
            elif statement and not statement.startswith(_DIRECTIVES):
                instructions.append(_instruction(statement, number))
    return Program(entry[1], parameters, int(threads[1]), registers, instructions, labels)


def _instruction(statement: str, line: int) -> Instruction:
    predicate, negated = None, False
    if found := _PREDICATED.match(statement):
        predicate, negated, statement = found[2], found[1] == "!", found[3]
    opcode, _, rest = statement.replace("\t", " ").partition(" ")
    return Instruction(opcode, tuple(_operand(part) for part in _OPERAND.findall(rest)), predicate, negated, line)


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text.startswith("["):
        found = _ADDRESS.match(text[1:-1].strip())
        if found is None:
            raise ValueError(f"the address {text} is not a base and an offset")
        return Address(found[1], int(found[2] or "0", 0))
    return text
