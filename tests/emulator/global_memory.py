"""Global memory: the elements of some tensors, in place. All else is out of bounds."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch

from .findings import POISON, Findings
from .races import Accesses, Clock

Array = np.ndarray


class _Region:
    """The memory from the first to the last byte of tensors that overlap."""

    def __init__(self, start: int, end: int, tensors: Sequence[torch.Tensor], inputs: Collection[int]) -> None:
        self.start, self.end = start, end
        self.data = np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))
        self.readable, self.writable = np.zeros(end - start, bool), np.zeros(end - start, bool)
        for tensor in tensors:
            if start <= tensor.data_ptr() < end:
                may_write = tensor.untyped_storage().data_ptr() not in inputs
                for mask in (self.readable, self.writable) if may_write else (self.readable,):
                    _elements(mask, tensor, tensor.data_ptr() - start)[...] = True
        self.whole = bool(self.readable.all()), bool(self.writable.all())
        self.races = _Races(end - start) if self.writable.any() else None


class _Races:
    """Accesses to each byte of memory that may be written.

    Blocks may share bytes by atomics. Anything else that a block does with such bytes comes after an acquire of its
    own, and after releases of the others that cover what they added: by the thread that released, or before a barrier.
    """

    def __init__(self, size: int) -> None:
        self.reads, self.writes = Accesses(size), Accesses(size)
        self.atomic = np.zeros(size, bool)  # of atomics
        self.shared = np.zeros(size, bool)  # of atomics of several blocks
        self.pending = np.zeros(size, bool)  # added by the latest block and not released
        self.lost = np.zeros(size, bool)  # added by a block that ended without release

    def check(self, byte: Array, thread: Array, clock: Clock, write: bool, findings: Findings) -> None:
        """Note what a read or write of `byte` by `thread` meets, and remember it."""
        what = f"global {'write' if write else 'read'} of what another"
        note = functools.partial(findings.note_where, "race")
        foreign = self.writes.by_another_block(byte, clock)
        note(f"{what} block wrote", foreign & ~self.atomic[byte])
        note(f"{what} thread wrote", self.writes.unordered(byte, thread, clock))
        shared = self.shared[byte] | (foreign & self.atomic[byte])
        if shared.any():
            note(f"{what} block added and did not release", self.lost[byte] | (self.pending[byte] & foreign))
            note(f"{what} block added, before an acquire", shared & ~clock.acquired(thread))
        if write:
            note(f"{what} block reads", self.reads.by_another_block(byte, clock) & ~self.atomic[byte])
            note(f"{what} thread reads", self.reads.unordered(byte, thread, clock))
        (self.writes if write else self.reads).add(byte, thread, clock)

    def check_atomic(self, byte: Array, thread: Array, clock: Clock, orders: bool, findings: Findings) -> None:
        """The same for an atomic; one that orders others needs no release itself."""
        what = "global atomic of what another"
        note = functools.partial(findings.note_where, "race")
        foreign = self.writes.by_another_block(byte, clock)
        note(f"{what} block wrote", foreign & ~self.atomic[byte])
        note(f"{what} thread reads", self.reads.unordered(byte, thread, clock))
        self.shared[byte] |= foreign
        self.lost[byte] |= foreign & self.pending[byte]
        self.writes.add(byte, thread, clock)
        self.atomic[byte], self.pending[byte] = True, not orders

    def release(self, thread: Array, clock: Clock) -> None:
        """A release by `thread`: what it added, and what others added before a barrier, is there for who acquires."""
        covered = (self.writes.epoch < clock.epoch) | np.isin(self.writes.thread, thread)
        self.pending &= ~(covered & (self.writes.block == clock.block))


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and of the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _elements(mask: Array, tensor: torch.Tensor, offset: int) -> Array:
    """The bytes of `mask` that are elements of the tensor, which begins at `offset`."""
    size = tensor.element_size()
    shape, strides = (*tensor.shape, size), (*(size * stride for stride in tensor.stride()), 1)
    return np.lib.stride_tricks.as_strided(mask[offset:], shape, strides)


class GlobalMemory:
    """What a launch may access. Accesses take the addresses of the threads that take part, and which those are.

    A wrong access is noted and goes on: what is read is POISON, what is written is dropped. `inputs` are addresses of
    storages that may only be read.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], inputs: Collection[int], findings: Findings) -> None:
        self.findings = findings
        tensors = [tensor for tensor in tensors if tensor.numel()]
        merged: list[tuple[int, int]] = []
        for start, end in sorted(_span(tensor) for tensor in tensors):
            if merged and start < merged[-1][1]:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            else:
                merged.append((start, end))
        self.regions = [_Region(start, end, tensors, inputs) for start, end in merged]
        self.starts = np.array([region.start for region in self.regions], np.int64)

    def _each(self, address: Array, size: int, write: bool) -> list[tuple[_Region, Array, Array]]:
        """(region, places among `address`, bytes [places, size]) of all accesses that are allowed; notes the others."""
        what = f"global {'write' if write else 'read'}"
        self.findings.check_alignment(address, size, what)
        number = np.searchsorted(self.starts, address, "right") - 1
        found, lost = [], int(np.count_nonzero(number < 0))
        for i in np.unique(number[number >= 0]):
            region = self.regions[i]
            places = np.flatnonzero(number == i)
            index = (address[places] - region.start)[:, None] + np.arange(size)
            allowed = index[:, -1] < region.end - region.start
            if not region.whole[write]:
                own = region.writable if write else region.readable
                allowed &= own[np.minimum(index, len(own) - 1)].all(1)
            lost += int(np.count_nonzero(~allowed))
            if allowed.any():
                found.append((region, places[allowed], index[allowed]))
        if lost:
            self.findings.note("out of bounds", what, lost)
        return found

    def _check(self, region: _Region, index: Array, thread: Array, clock: Clock, write: bool) -> None:
        if region.races is not None:
            region.races.check(index.ravel(), np.repeat(thread, index.shape[1]), clock, write, self.findings)

    def read(self, address: Array, size: int, thread: Array, clock: Clock) -> Array:
        """Bytes [addresses, size]."""
        out = np.full((len(address), size), POISON, np.uint8)
        for region, places, index in self._each(address, size, False):
            self._check(region, index, thread[places], clock, False)
            out[places] = region.data[index]
        return out

    def write(self, address: Array, data: Array, thread: Array, clock: Clock) -> None:
        """Write bytes [addresses, size]. What is there already may be written by several threads."""
        for region, places, index in self._each(address, data.shape[1], True):
            self._check(region, index, thread[places], clock, True)
            region.data[index] = data[places]
            twice = (region.data[index] != data[places]).any(1)
            self.findings.note_where("race", "global write by two threads at once", twice)

    def update(
        self, address: Array, size: int, change: Callable[[int, Array], Array], order: str, thread: Array, clock: Clock
    ) -> Array:
        """Replace the bytes at each address, one thread after the other, by change(place, bytes); returns the old.

        `order` is relaxed, acquire, release or acq_rel.
        """
        if order in ("release", "acq_rel"):
            for region in self.regions:
                if region.races is not None:
                    region.races.release(thread, clock)
        out = np.full((len(address), size), POISON, np.uint8)
        for region, places, index in self._each(address, size, True):
            assert region.races is not None
            threads = np.repeat(thread[places], size)
            region.races.check_atomic(index.ravel(), threads, clock, order != "relaxed", self.findings)
            for place, where in zip(places, index, strict=True):
                out[place] = region.data[where]
                region.data[where] = change(int(place), out[place].copy())
        if order in ("acquire", "acq_rel"):
            clock.acquire(thread)
        return out
