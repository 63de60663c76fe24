"""The page allocator never hands out a page twice, and never loses one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllmserve.core.pages import TRASH_PAGE, PageAllocator


@given(st.integers(0, 40), st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60))
def test_any_history(size: int, history: list[tuple[bool, int]]) -> None:
    pages, held = PageAllocator(size), []
    for reserve, count in history:
        if reserve and count <= pages.num_free:
            held.append(pages.reserve(count))
            assert len(held[-1]) == count
        elif reserve:
            with pytest.raises(ValueError, match=f"{count} pages asked for, {pages.num_free} free"):
                pages.reserve(count)
        elif held:
            pages.free(held.pop(count % len(held)))
        pages.check_integrity()
        out = [page for taken in held for page in taken]
        assert len(set(out)) == len(out)
        assert all(1 <= page <= size for page in out)
        assert pages.num_free == size - len(out)


def test_the_trash_page_is_never_handed_out() -> None:
    pages = PageAllocator(3)
    assert TRASH_PAGE not in pages.reserve(3)


def test_freeing_what_was_not_taken() -> None:
    pages = PageAllocator(3)
    taken = pages.reserve(1)
    pages.free(taken)
    with pytest.raises(ValueError, match=f"page {taken[0]} is freed but was not in use"):
        pages.free(taken)


@pytest.mark.parametrize("damage", ["lost", "twice", "both"])
def test_check_integrity_sees_damage(damage: str) -> None:
    pages = PageAllocator(4)
    taken = pages.reserve(2)
    if damage == "lost":
        del pages._holders[taken[0]]
    elif damage == "twice":
        pages._free.append(pages._free[0])
        del pages._holders[taken[0]]
    else:
        pages._free.append(taken[0])
        pages._free.popleft()
    with pytest.raises(ValueError, match="page"):
        pages.check_integrity()
