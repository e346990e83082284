"""Keeps track of the free cache pages: host bookkeeping only, no arrays, no device."""

from __future__ import annotations

from collections.abc import Iterable

from sparse_mla_jax._check import require


class PageAllocator:
    """Hands out page numbers 0..num_pages-1; each page has at most one owner at a time.

    Taking or returning one page is O(1). The page returned last is handed out first, which keeps the working set small.
    Not thread-safe: one scheduler owns an allocator.
    """

    def __init__(self, num_pages: int):
        """Makes an allocator with every page free.

        Raises:
          ValueError: `num_pages` is not a positive int.
        """
        require(
            isinstance(num_pages, int) and not isinstance(num_pages, bool) and num_pages >= 1,
            f"num_pages is {num_pages!r}; an int of at least 1 is expected. Give the caches at least one page.",
        )
        self._free = list(range(num_pages - 1, -1, -1))
        self._owned = bytearray(num_pages)

    @property
    def num_pages(self) -> int:
        """Total number of pages."""
        return len(self._owned)

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages with an owner."""
        return self.num_pages - self.num_free

    def allocate(self, count: int) -> list[int] | None:
        """Takes `count` pages; returns None and takes none if fewer are free.

        Raises:
          ValueError: `count` is negative.
        """
        require(count >= 0, f"count is {count}; a number of pages is expected, so at least 0.")
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owned[page] = 1
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Returns `pages`, all or none.

        Raises:
          ValueError: a page does not exist, has no owner, or is named twice; then no page is returned.
        """
        returned: list[int] = []
        try:
            for page in pages:
                require(
                    0 <= page < self.num_pages,
                    f"page {page} does not exist; pages are 0..{self.num_pages - 1}. Return what allocate() gave.",
                )
                require(
                    bool(self._owned[page]),
                    f"page {page} is returned but nobody owns it; each page goes back exactly once.",
                )
                self._owned[page] = 0
                returned.append(page)
        except BaseException:
            for page in returned:
                self._owned[page] = 1
            raise
        self._free.extend(reversed(returned))
