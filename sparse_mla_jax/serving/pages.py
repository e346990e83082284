"""Keeps track of the free cache pages: host bookkeeping only, no arrays, no device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sparse_mla_jax import _check
from sparse_mla_jax._check import require


class PageAllocator:
    """Hands out page numbers 0..num_pages-1 of every device; each page has at most one owner at a time.

    Column p of a request's page table is a page of device p % devices, of those of the axis "context". A request's
    columns are given in order, so it has at most one page more on a device than on the next.

    Taking or returning one page is O(1). The page returned last is handed out first, which keeps the working set small.
    Not thread-safe: one scheduler owns an allocator.
    """

    def __init__(self, num_pages: int, devices: int = 1):
        """Makes an allocator with every page free.

        Args:
          num_pages: pages of each device.
          devices: over which the pages of a request are spread.

        Raises:
          ValueError: `num_pages` or `devices` is not a positive int.
        """
        require(
            isinstance(num_pages, int) and not isinstance(num_pages, bool) and num_pages >= 1,
            f"num_pages is {num_pages!r}; an int of at least 1 is expected. Give the caches at least one page.",
        )
        self.devices = _check.size("devices", devices)
        self._free = [list(range(num_pages - 1, -1, -1)) for _ in range(self.devices)]
        self._owned = [bytearray(num_pages) for _ in range(self.devices)]

    @property
    def num_pages(self) -> int:
        """Pages of each device."""
        return len(self._owned[0])

    @property
    def num_free(self) -> int:
        """Pages without an owner, on all devices."""
        return sum(map(len, self._free))

    @property
    def num_used(self) -> int:
        """Pages with an owner, on all devices."""
        return self.num_pages * self.devices - self.num_free

    def has(self, needed: Sequence[int]) -> bool:
        """Whether needed[d] pages of every device d are free."""
        return all(count <= len(free) for count, free in zip(needed, self._free, strict=True))

    def per_device(self, count: int, first: int = 0) -> list[int]:
        """How many of the columns first .. first + count - 1 lie on each device."""
        return [len(range((device - first) % self.devices, count, self.devices)) for device in range(self.devices)]

    def allocate(self, count: int, first: int = 0) -> list[int] | None:
        """Takes pages for the columns first .. first + count - 1; returns None and takes none if fewer are free.

        Raises:
          ValueError: `count` is negative.
        """
        require(count >= 0, f"count is {count}; a number of pages is expected, so at least 0.")
        if not self.has(self.per_device(count, first)):
            return None
        pages = []
        for column in range(first, first + count):
            device = column % self.devices
            pages.append(self._free[device].pop())
            self._owned[device][pages[-1]] = 1
        return pages

    def free(self, pages: Iterable[int], first: int = 0) -> None:
        """Returns `pages`, which are those of the columns from `first` on, all or none.

        Raises:
          ValueError: a page does not exist, has no owner, or is named twice; then no page is returned.
        """
        returned: list[tuple[int, int]] = []
        try:
            for column, page in enumerate(pages, first):
                owned = self._owned[column % self.devices]
                require(
                    0 <= page < self.num_pages,
                    f"page {page} does not exist; pages are 0..{self.num_pages - 1}. Return what allocate() gave.",
                )
                require(
                    bool(owned[page]),
                    f"page {page} is returned but nobody owns it; each page goes back exactly once.",
                )
                owned[page] = 0
                returned.append((column % self.devices, page))
        except BaseException:
            for device, page in returned:
                self._owned[device][page] = 1
            raise
        for device, page in reversed(returned):
            self._free[device].append(page)
