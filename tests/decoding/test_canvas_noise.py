"""The renoise rule against plain Python, and the noise that it draws."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from dllmserve.decoding.noise import CounterNoise, Recorded, RecordedNoise
from dllmserve.decoding.renoise import RenoiseRule
from dllmserve.decoding.rule import CanvasView, Memory, RuleView
from dllmserve.sampling_params import FLOATS

ENTROPIES = st.lists(st.floats(0, 3, width=32), min_size=4, max_size=4)


@given(
    entropies=st.lists(ENTROPIES, min_size=1, max_size=3),
    tokens=st.lists(st.integers(0, 1), min_size=4, max_size=4),
    before=st.lists(st.integers(0, 1), min_size=4, max_size=4),
    steady=st.integers(0, 2),
    length=st.integers(1, 4),
    step=st.integers(0, 3),
    bound=st.floats(0, 2),
    stability=st.integers(0, 2),
    sure=st.floats(0, 3),
)
def test_rule_equals_its_twin(
    entropies: list[list[float]],
    tokens: list[int],
    before: list[int],
    steady: int,
    length: int,
    step: int,
    bound: float,
    stability: int,
    sure: float,
) -> None:
    """Canvases of ``length`` positions side by side, padded to 4."""
    n = len(entropies)
    open_ = torch.arange(4).expand(n, 4) < length
    entropy = torch.tensor(entropies, dtype=torch.float64).masked_fill(~open_, torch.inf)
    floats = torch.zeros(n, len(FLOATS), dtype=torch.float64)
    for name, value in (
        ("entropy_bound", bound),
        ("stability_threshold", stability),
        ("confidence_threshold", sure),
        ("max_denoising_steps", 4),
    ):
        floats[:, FLOATS.index(name)] = value
    best = torch.tensor(tokens).expand(n, 4)
    canvas = CanvasView(torch.full((n,), step), best + 10, best + 20)
    cells = torch.tensor(before, dtype=torch.float64).expand(n, 4)
    view = RuleView(
        eligible=open_,
        tokens=best,
        confidence=torch.zeros(n, 4),
        entropy=entropy,
        quota=torch.zeros(n),
        floats=floats,
        memory=Memory(torch.full((n,), float(steady), dtype=torch.float64), cells),
        canvas=canvas,
    )
    update = RenoiseRule().apply(view)
    assert update.memory is not None and update.draft is not None
    for i, row in enumerate(entropies):
        spent, kept = 0.0, set[int]()
        for place in sorted(range(length), key=lambda p: row[p]):
            if spent <= bound:
                kept.add(place)
            spent += row[place]
        held = [tokens[p] + (10 if p in kept else 20) for p in range(length)]
        assert update.draft[i, :length].tolist() == held
        same = tokens[:length] == before[:length]
        assert float(update.memory.row[i]) == (steady + 1 if same else 0)
        done = float(update.memory.row[i]) >= stability and spent / length < sure
        assert update.write[i].tolist() == [(done or step == 3) and p < length for p in range(4)]


def test_noise_is_uniform_and_nobodys_is_anothers() -> None:
    noise, width = CounterNoise(50), 5000
    position = torch.arange(3, 3 + width)[None]
    seeds = [torch.tensor([n]) for n in (1, 2)]
    rows = [noise.ids(seed, position, torch.tensor([step])) for seed in seeds for step in (-1, 0)]
    for row in rows:
        assert chisquare(torch.bincount(row[0], minlength=50).numpy()).pvalue > 1e-4
    for i, row in enumerate(rows):
        for other in rows[:i]:
            assert 0.01 < float((row == other).double().mean()) < 0.03
    both = noise.ids(torch.tensor([1, 2]), position.expand(2, -1), torch.tensor([-1, 0]))
    assert torch.equal(both[0], rows[0][0]) and torch.equal(both[1], rows[3][0])


def test_recorded_draws_are_of_their_seed_alone() -> None:
    record = Recorded(2, [[5, 6], [7, 8]], [[[9, 1], [3, 4]], [[2, 2]]], [[[8, 8]]])
    noise, counted = RecordedNoise(50, {7: record}), CounterNoise(50)
    seed, position = torch.tensor([7, 3]), torch.tensor([[2, 3, 4, 5], [2, 3, 4, 5]])
    for step, expected in ((-1, [5, 6, 7, 8]), (0, [9, 1, 2, 2]), (1, [3, 4])):
        steps = torch.full((2,), step)
        found, other = noise.ids(seed, position, steps), counted.ids(seed, position, steps)
        assert found[0, : len(expected)].tolist() == expected
        assert torch.equal(found[0, len(expected) :], other[0, len(expected) :])
        assert torch.equal(found[1], other[1])
    drawn = torch.zeros_like(position)
    assert noise.drawn(drawn, seed, position, torch.zeros(2).long())[0].tolist() == [8, 8, 0, 0]
