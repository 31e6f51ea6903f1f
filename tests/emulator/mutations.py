"""Changes of the compiled code that the emulator should notice, and some that it cannot."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from . import trial
from .cases import CASES

# (case, architecture) whose code is changed: each has its own way to multiply, to wait or to reduce.
BASES = [
    ("linear ternary, even", 80),
    ("linear ternary, even", 90),
    ("linear split, one scale", 90),
    ("linear ternary, 3 slices", 90),
    ("linear binary, 5 tokens", 80),
    ("attention fp16", 80),
    ("attention fp16", 90),
    ("attention fp16 D=16, short, 8 bits", 90),
    ("quantize rows 5x777 bfloat16, 8 bits asymmetric", 80),
]
BY_NAME = {case.name: case for case in CASES}
MOST = 4  # of the places of a kind in a kernel, evenly spread


@dataclass(frozen=True)
class Kind:
    """Every match of `pattern` in the PTX is a place to change; `every` tries all, not only a few,
    and `together` changes them all at once.

    `invisible` says why the emulator cannot notice it; else at least `share` of those tried has to be noticed.
    """

    name: str
    pattern: str
    change: Callable[[re.Match[str]], str]
    every: bool = False
    together: bool = False
    share: float = 0.5
    invisible: str = ""


def _more(group: int, by: int = 1) -> Callable[[re.Match[str]], str]:
    """Add to the number in a group."""

    def change(found: re.Match[str]) -> str:
        start, end = found.start(group) - found.start(), found.end(group) - found.start()
        return f"{found[0][:start]}{int(found[group]) + by}{found[0][end:]}"

    return change


def _nothing(found: re.Match[str]) -> str:
    return ""


def _beyond(by: int) -> Callable[[re.Match[str]], str]:
    """Add to the offset of an address, which may have none: group 1 ends with the base, 2 is the offset."""
    return lambda found: f"{found[1]}+{int(found[2] or 0) + by}]"


def _halved(found: re.Match[str]) -> str:
    return _more(1, int(found[1]) // 2 - int(found[1]))(found)


def _swapped(found: re.Match[str]) -> str:
    return f"{found[1]}{found[3]}, {found[2]}"


KINDS = [
    Kind("barrier removed", r"bar\.sync\s+0;", _nothing, every=True),
    Kind("barrier of a warp removed", r"bar\.warp\.sync\s+-1;", _nothing, every=True),
    Kind("cp.async waited for a group later", r"cp\.async\.wait_group\s+(\d+);", _more(1), every=True),
    Kind("cp.async.commit_group removed", r"cp\.async\.commit_group;", _nothing, every=True),
    Kind("wgmma waited for a group later", r"wgmma\.wait_group\.sync\.aligned (\d+);", _more(1), every=True),
    Kind("wgmma.fence removed", r"wgmma\.fence\.sync\.aligned;", _nothing, every=True),
    Kind("fence.proxy.async removed", r"fence\.proxy\.async[\w:.]*;", _nothing, every=True),
    Kind("lop3 table", r"lop3\.b32 [^;]*0x6A;", lambda m: m[0].replace("0x6A", "0xEA")),
    Kind("shift by one more", r"sh[lr]\.[bsu]\d+\s+[^;]*, (\d+);", _more(1)),
    Kind("mask without its lowest bit", r"and\.b32\s+[^;]*, (\d+);", lambda m: _more(1, -(int(m[1]) & -int(m[1])))(m)),
    Kind("added constant", r"add\.s(?:32|64)\s+[^;]*, (-?\d+);", _more(1)),
    Kind("compared constant", r"setp\.\w+\.[su]32\s+[^;]*, (-?\d+);", _more(1), share=0.2),
    Kind("all comparisons < to <=", r"setp\.lt\.s32", lambda m: "setp.le.s32", together=True),
    Kind("float constant negated", r"0f(?!0{8})([0-9A-F])", lambda m: f"0f{int(m[1], 16) ^ 8:X}"),
    Kind("predicate of a global store dropped", r"@!?%p\d+ (st\.global)", lambda m: m[1]),
    Kind("predicate of a global load dropped", r"@!?%p\d+ (ld\.global)", lambda m: m[1]),
    Kind("predicate of a shared store dropped", r"@!?%p\d+ (st\.shared)", lambda m: m[1], share=0.2),
    Kind("predicate of a branch negated", r"@(%p\d+\s+bra)", lambda m: f"@!{m[1]}"),
    Kind("global store 4 bytes on", r"st\.global[^\[]*\[ %rd\d+ \+ (\d+) \]", _more(1, 4)),
    Kind("global load 4 bytes on", r"ld\.global[^\[]*\[ %rd\d+ \+ (\d+) \]", _more(1, 4)),
    Kind("shared store 16 bytes on", r"st\.shared[^\[]*\[ %r\d+ \+ (\d+) \]", _more(1, 16)),
    Kind("shared load 16 bytes on", r"(ld\.shared[^\[]*\[%r\d+)(?:\+(\d+))?\]", _beyond(16)),
    Kind("ldmatrix 16 bytes on", r"(ldmatrix[^\[]*\[%r\d+)(?:\+(\d+))?\]", _beyond(16)),
    Kind("cp.async from 16 bytes on", r"cp\.async\.c[^;]*%rd\d+ \+ (\d+) \]", _more(1, 16)),
    Kind("cp.async to 16 bytes on", r"cp\.async\.c[ag]\.shared\.global \[ %r\d+ \+ (\d+) \]", _more(1, 16)),
    Kind("wgmma descriptor 32 bytes on", r"(?:or|add)\.[bs]64\s+[^;]*, (46116862933\d+);", _more(1, 2)),
    Kind("mma of other columns", r"(mma\.sync[^{]*\{[^}]*\}, \{[^}]*\}, \{ )(%r\d+), (%r\d+)", _swapped),
    Kind("shuffle over half the distance", r"shfl\.sync\.bfly\.b32[^;]*, (\d+), 31, -1;", _halved),
    Kind("bytes permuted otherwise", r"prmt\.b32[^;]*0x(\d)", lambda m: m[0][:-1] + str(int(m[1]) ^ 1)),
    Kind("atomic add of another value", r"(atom\.global[^;]*\], )%r\d+;", lambda m: f"{m[1]}%tid.x;"),
    Kind("atomic without order", r"(atom\.global\.gpu\.)acq_rel", lambda m: f"{m[1]}relaxed", every=True),
    Kind("atomic without release", r"(atom\.global\.gpu\.)acq_rel", lambda m: f"{m[1]}acquire", every=True),
    Kind("atomic without acquire", r"(atom\.global\.gpu\.)acq_rel", lambda m: f"{m[1]}release", every=True),
    Kind(
        "load through the L1 cache", r"ld\.global\.cg", lambda m: "ld.global",
        invisible="there are no caches",
    ),
    Kind(
        "exp2 flushes subnormals or not", r"ex2\.approx\.ftz\.f32", lambda m: "ex2.approx.f32",
        invisible="what is lost lies far below the tolerance",
    ),
]  # fmt: skip
BY_KIND = {kind.name: kind for kind in KINDS}


@dataclass
class Outcome:
    """Of the mutations of one kind: how many were tried, and by what they were noticed."""

    kind: str
    tried: int = 0
    noticed: int = 0
    by: Counter[str] = field(default_factory=Counter)
    missed: list[str] = field(default_factory=list)

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.kind, self.tried + other.tried, self.noticed + other.noticed, self.by + other.by,
            self.missed + other.missed,
        )  # fmt: skip

    @property
    def good(self) -> bool:
        """Whether as many were noticed as have to be."""
        kind = BY_KIND[self.kind]
        return bool(kind.invisible) or self.tried == 0 or self.noticed >= kind.share * self.tried


class _Compiled(Exception):
    """Carries the PTX out of a launch."""


def compiled(case: trial.Case, arch: int) -> str:
    """The PTX of the first launch of a case."""

    def keep(ptx: str) -> str:
        raise _Compiled(ptx)

    try:
        trial.run(case, arch, change=keep, modes=(False,))
    except _Compiled as stopped:
        return str(stopped)
    raise ValueError(f"{case.name} launches nothing")


def variants(ptx: str, kind: Kind) -> list[tuple[str, str]]:
    """(where, changed PTX) of the places where a kind is tried."""
    if kind.together:
        changed = re.sub(kind.pattern, kind.change, ptx)
        return [("everywhere", changed)] if changed != ptx else []
    found = list(re.finditer(kind.pattern, ptx))
    if not kind.every and len(found) > MOST:
        found = [found[i * (len(found) - 1) // (MOST - 1)] for i in range(MOST)]
    return [
        (
            f"line {ptx.count(chr(10), 0, own.start()) + 1}: {' '.join(own[0].split())[:80]}",
            ptx[: own.start()] + kind.change(own) + ptx[own.end() :],
        )
        for own in found
    ]


def run(base: int, kind: Kind) -> Outcome:
    """Try a kind on `BASES[base]`: late, and where that shows nothing, early."""
    name, arch = BASES[base]
    case = BY_NAME[name]
    ptx = compiled(case, arch)
    outcome = Outcome(kind.name)
    for where, changed in variants(ptx, kind):
        assert changed != ptx, f"{kind.name} changes nothing, {where}"
        for early in (False, True):
            result = trial.run(case, arch, change=lambda _: changed, modes=(early,))  # noqa: B023
            if not result.clean:
                break
        outcome.tried += 1
        seen = [*result.findings, *(["wrong values"] if result.wrong else []), *(["stopped"] if result.fault else [])]
        outcome.by.update(seen)
        outcome.noticed += bool(seen)
        if not seen:
            outcome.missed.append(f"{name}, sm_{arch}, {where}")
    return outcome
