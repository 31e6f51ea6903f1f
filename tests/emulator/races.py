"""Which accesses to memory nothing orders."""

from __future__ import annotations

import numpy as np

Array = np.ndarray
NOBODY, SEVERAL = -1, -2


class Clock:
    """The time of a block: its barriers end an epoch, in which barriers of a warp end an interval of its threads."""

    def __init__(self, block: int, threads: int) -> None:
        self.block = block
        self.epoch = 0
        self.interval = np.zeros(threads, np.int64)
        self._acquired = np.zeros(threads, bool)

    def acquire(self, thread: Array) -> None:
        """Threads acquire what other blocks released."""
        self._acquired[thread] = True

    def acquired(self, thread: Array) -> Array:
        """Which threads come after an acquire: of their own, or of another one before a barrier."""
        return self._acquired[thread]

    def barrier(self) -> None:
        """All threads have arrived."""
        self.epoch += 1
        self._acquired[:] = self._acquired.any()

    def warp_barrier(self, thread: Array) -> None:
        """The threads of some warps have arrived."""
        self.interval[thread] += 1


class Accesses:
    """The latest access to each granule of a memory: by which block, warp and thread (or SEVERAL), and when."""

    def __init__(self, granules: int) -> None:
        self.block, self.warp, self.thread = (np.full(granules, NOBODY) for _ in range(3))
        self.epoch, self.interval = (np.full(granules, -1) for _ in range(2))

    def _now(self, granule: Array, clock: Clock) -> Array:
        """Which were accessed by this block since its last barrier."""
        return (self.epoch[granule] == clock.epoch) & (self.block[granule] == clock.block)

    def unordered(self, granule: Array, thread: Array, clock: Clock) -> Array:
        """Which granules another thread of the block accessed with no barrier since that orders it before `thread`."""
        now = self._now(granule, clock)
        if not now.any():
            return now
        ordered = (self.warp[granule] == thread // 32) & (self.interval[granule] < clock.interval[thread])
        return now & ~ordered & (self.thread[granule] != thread)

    def by_another_block(self, granule: Array, clock: Clock) -> Array:
        """Which granules another block accessed."""
        return (self.block[granule] != NOBODY) & (self.block[granule] != clock.block)

    def add(self, granule: Array, thread: Array, clock: Clock) -> None:
        """`thread` accesses `granule` now."""
        warp, interval = thread // 32, clock.interval[thread]
        now = self._now(granule, clock)
        if now.any():
            others = now & (self.warp[granule] != warp)
            joined = now & (self.interval[granule] == interval) & (self.thread[granule] != thread)
            warp, thread = np.where(others, SEVERAL, warp), np.where(others | joined, SEVERAL, thread)
        self.block[granule], self.epoch[granule], self.interval[granule] = clock.block, clock.epoch, interval
        self.warp[granule], self.thread[granule] = warp, thread
        # Of several threads at one granule, the last was kept.
        self.warp[granule[self.warp[granule] != warp]] = SEVERAL
        self.thread[granule[self.thread[granule] != thread]] = SEVERAL
