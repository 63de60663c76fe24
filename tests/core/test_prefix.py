"""Names of pages: equal exactly where K and V are; and pages that are kept for their name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllmserve.core.pages import PageAllocator
from dllmserve.core.prefix import PageNames

IDS = st.lists(st.integers(0, 2), max_size=40)


def names(ids: list[int], page: int, window: int, salt: str = "") -> list[bytes]:
    made = PageNames(page, window, salt)
    made.learn(ids)
    return [made[i] for i in range(len(made))]


@given(IDS, IDS, st.integers(1, 7), st.integers(1, 7))
def test_names_are_equal_where_a_page_follows_from_equal_tokens(
    one: list[int], other: list[int], page: int, window: int
) -> None:
    def sight(index: int) -> int:
        return -(-(index + 1) * page // window) * window

    first, second = names(one, page, window), names(other, page, window)
    for made, ids in ((first, one), (second, other)):
        assert len(made) == sum(sight(i) <= len(ids) for i in range(40))
        assert len({*made}) == len(made)
    for i, pair in enumerate(zip(first, second, strict=False)):
        assert (pair[0] == pair[1]) == (one[: sight(i)] == other[: sight(i)])


@given(IDS, st.integers(0, 40), st.integers(1, 7), st.integers(1, 7))
def test_what_is_learnt_bit_by_bit(ids: list[int], cut: int, page: int, window: int) -> None:
    made = PageNames(page, window, "")
    made.learn(ids[:cut])
    made.learn(ids)
    assert [made[i] for i in range(len(made))] == names(ids, page, window)


def test_other_salts_and_sizes_have_no_name_in_common() -> None:
    ids = [1] * 24
    kinds = [names(ids, 4, 4), names(ids, 4, 4, "a"), names(ids, 4, 8), names(ids, 8, 4)]
    assert len({name for kind in kinds for name in kind}) == sum(map(len, kinds))


def test_a_page_with_a_name_is_kept_until_it_is_needed() -> None:
    pages = PageAllocator(3)
    first, second = pages.reserve(2)
    pages.name(first, b"first")
    pages.name(second, b"second")
    pages.free([first, second])
    assert pages.num_free == 3
    assert pages.find(b"first") == first and not pages.holders(first)
    pages.share([first])  # somebody has found it
    pages.reserve(1)  # the page that was never used
    assert pages.find(b"second") == second
    assert pages.reserve(1) == [second]
    assert pages.find(b"second") is None and pages.find(b"first") == first
    pages.check_integrity()


def test_the_first_page_of_a_name_stays() -> None:
    pages = PageAllocator(3)
    first, second = pages.reserve(2)
    for page in (first, second):
        pages.name(page, b"same")
    assert pages.find(b"same") == first
    pages.free([second])
    with pytest.raises(ValueError, match=f"page {second} is shared but was not in use"):
        pages.share([second])
    pages.check_integrity()


def test_names_are_forgotten() -> None:
    pages = PageAllocator(2)
    held, free = pages.reserve(2)
    pages.name(held, b"held")
    pages.name(free, b"free")
    pages.free([free])
    pages.forget()
    assert pages.find(b"held") is None and pages.find(b"free") is None
    pages.check_integrity()
    pages.free([held])
    assert sorted(pages.reserve(2)) == [1, 2]
