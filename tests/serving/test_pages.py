"""The page allocator: all or nothing, one owner a page, nothing lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_mla_jax.serving.pages import PageAllocator


def test_allocates_distinct_pages_until_none_is_left():
    allocator = PageAllocator(5)
    pages = allocator.allocate(5)
    assert sorted(pages) == [0, 1, 2, 3, 4]
    assert (allocator.num_free, allocator.num_used) == (0, 5)
    assert allocator.allocate(1) is None
    assert allocator.allocate(0) == []


def test_allocation_is_all_or_nothing():
    allocator = PageAllocator(3)
    allocator.allocate(1)
    assert allocator.allocate(3) is None
    assert allocator.num_free == 2
    assert len(allocator.allocate(2)) == 2


def test_double_free_is_an_error_and_changes_nothing():
    allocator = PageAllocator(4)
    pages = allocator.allocate(3)
    allocator.free(pages[:1])
    with pytest.raises(ValueError, match=r"nobody owns it"):
        allocator.free([pages[1], pages[0]])
    assert allocator.num_used == 2
    with pytest.raises(ValueError, match="nobody owns it"):
        allocator.free([pages[1], pages[1]])
    allocator.free(pages[1:])
    assert allocator.num_free == 4


@pytest.mark.parametrize("page", [-1, 4])
def test_unknown_page_is_an_error(page):
    allocator = PageAllocator(4)
    allocator.allocate(4)
    with pytest.raises(ValueError, match="does not exist"):
        allocator.free([page])
    assert allocator.num_used == 4


@pytest.mark.parametrize("num_pages", [0, -1, 1.5, True, "8"])
def test_bad_sizes(num_pages):
    with pytest.raises(ValueError, match="num_pages"):
        PageAllocator(num_pages)


def test_negative_count():
    with pytest.raises(ValueError, match="count is -1"):
        PageAllocator(1).allocate(-1)


@settings(deadline=None, max_examples=50, database=None)
@given(st.integers(1, 20), st.lists(st.integers(-5, 6), max_size=60))
def test_against_a_set(num_pages, moves):
    """Positive moves allocate that many pages, others return the oldest holding; a plain set is the model."""
    allocator, holdings = PageAllocator(num_pages), []
    for move in moves:
        if move > 0:
            pages = allocator.allocate(move)
            held = {page for holding in holdings for page in holding}
            if pages is None:
                assert move > num_pages - len(held)
            else:
                assert len(set(pages)) == move and not held & set(pages)
                holdings.append(pages)
        elif holdings:
            allocator.free(holdings.pop(0))
        assert allocator.num_used == sum(map(len, holdings))
    for holding in holdings:
        allocator.free(holding)
    assert allocator.num_free == num_pages
