"""The queue that anything may leave: what a list would do, in one step each."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllmserve.core.line import Line

MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 9)),
        st.tuples(st.just("discard"), st.integers(0, 9)),
        st.tuples(st.just("popleft"), st.none()),
        st.tuples(st.just("put_back"), st.lists(st.integers(0, 9), unique=True, max_size=4)),
    )
)


@given(MOVES)
def test_it_is_a_list(moves: list[tuple[str, object]]) -> None:
    line: Line[object] = Line()
    model: list[object] = []
    for move, given_ in moves:
        if move == "append" and given_ not in model:
            line.append(given_)
            model.append(given_)
        elif move == "discard":
            line.discard(given_)
            model = [item for item in model if item != given_]
        elif move == "popleft" and model:
            assert line.popleft() == model.pop(0)
        elif move == "put_back" and isinstance(given_, list):
            items = [item for item in given_ if item not in model]
            line.put_back(items)
            model[:0] = items
        assert list(line) == model and len(line) == len(model) and bool(line) is bool(model)
    if not model:
        with pytest.raises(KeyError):
            line.popleft()
