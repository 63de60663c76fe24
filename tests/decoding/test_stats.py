"""Statistics of logit rows against their definitions in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dllmserve.decoding.stats import NO_CONFIDENCE, RowParams, TokenStats, row_stats
from dllmserve.decoding.transforms import filter_logits
from tests.oracles import dream

MASK = 4
BOTH = frozenset({"margin", "entropy"})


def parameters(
    rows: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    tempered: bool = False,
    seed: int = 0,
) -> RowParams:
    return RowParams(
        temperature=torch.full((rows,), temperature, dtype=torch.float64),
        top_p=torch.full((rows,), top_p, dtype=torch.float64),
        top_k=torch.full((rows,), top_k),
        tempered=torch.full((rows,), tempered),
        keys=torch.arange(rows) * 7919 + seed,
    )


def stats(z: Tensor, params: RowParams, needs: frozenset[str] = BOTH) -> TokenStats:
    sampled = bool((params.temperature > 0).any())
    filtered = bool(((params.top_p < 1) | (params.top_k > 0)).any())
    return row_stats(z, params, mask_id=MASK, sampled=sampled, filtered=filtered, needs=needs)


def logits(rows: int, vocab: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    z = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale
    z[:, MASK] = -3 * scale
    return z


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_greedy(scale: float) -> None:
    z = logits(64, 23, scale)
    got = stats(z, parameters(64))
    p = z.double().softmax(dim=-1)
    best = p.topk(2, dim=-1).values
    assert got.token.tolist() == z.argmax(dim=-1).tolist()
    torch.testing.assert_close(got.prob, best[:, 0], atol=1e-6, rtol=1e-6)
    assert got.margin is not None
    assert got.entropy is not None
    torch.testing.assert_close(got.margin, best[:, 0] - best[:, 1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.entropy, torch.special.entr(p).sum(-1), atol=1e-6, rtol=1e-5)


def test_unasked_statistics_are_left_out() -> None:
    got = stats(logits(3, 9), parameters(3), frozenset())
    assert got.margin is None
    assert got.entropy is None


def test_confident_rows_keep_their_order() -> None:
    """Rounded to float32 all of these are 1."""
    z = torch.zeros(5, 12)
    z[:, 0] = torch.tensor([20.0, 21.0, 22.0, 23.0, 24.0])
    prob = stats(z, parameters(5)).prob
    assert bool((prob[1:] > prob[:-1]).all())
    assert bool((prob.float() == 1).all())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("tempered", [False, True])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.6, 0), (1.0, 1), (0.9, 5)])
def test_proposals_without_confidence(
    temperature: float, tempered: bool, top_p: float, top_k: int
) -> None:
    """The same tokens; numbers of the distribution that the struck ids are taken out of."""
    z = logits(64, 23)
    z[:, 9] += 4
    last = torch.tensor([[9, 2]]).repeat(64, 1)
    last[::4] = -1
    params = parameters(64, temperature, top_p, top_k, tempered)
    before = stats(z, params)
    base = z.double() / (temperature or 1.0) if tempered else z.double()
    if tempered:
        base = filter_logits(base.float(), params.top_p, params.top_k).double()
    got = stats(z.clone(), replace(params, last=last))
    assert got.token.tolist() == before.token.tolist()
    assert got.margin is not None
    assert got.entropy is not None
    seen = set()
    for row, token in enumerate(got.token.tolist()):
        numbers = [float(x[row]) for x in (got.prob, got.margin, got.entropy)]
        struck = base[row].clone()
        struck[last[row][last[row] >= 0]] = -torch.inf
        p = struck.softmax(dim=-1)
        if token in last[row]:
            assert numbers == [0.0, 0.0, NO_CONFIDENCE]
        else:
            top = p.topk(2).values
            expected = [p[token], top[0] - top[1], torch.special.entr(p).sum()]
            assert numbers == pytest.approx([float(x) for x in expected], rel=1e-4, abs=1e-6)
        seen.add(token in last[row])
    assert seen == {True, False}


def test_rows_without_numbers_stay_so() -> None:
    z = logits(3, 9)
    z[0, 2], z[1, 5] = torch.nan, torch.nan
    got = stats(z, replace(parameters(3), last=torch.full((3, 1), 2)))
    assert got.prob.isnan().tolist() == [True, True, False]


def test_the_mask_id_counts_in_the_normalisation_only() -> None:
    z = torch.tensor([[1.0, 0.0, 0.0, 0.0, 2.0]])
    got = stats(z, parameters(1))
    assert got.token.tolist() == [0]
    assert float(got.prob) == pytest.approx(float(z.double().softmax(-1)[0, 0]))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 4, 500])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.5])
def test_the_tempered_distribution(top_p: float, top_k: int, temperature: float) -> None:
    z = logits(40, 19)
    given_params = parameters(40, temperature, top_p, top_k, tempered=True)
    got = stats(z, given_params)
    scaled = (z.double() / (temperature or 1.0)).float()
    p = dream.filtered(scaled, top_p, top_k or None).double().softmax(dim=-1)
    assert bool((p.gather(1, got.token[:, None]) > 0).all())
    torch.testing.assert_close(
        got.prob, p.gather(1, got.token[:, None])[:, 0], atol=1e-6, rtol=1e-5
    )
    assert got.entropy is not None
    torch.testing.assert_close(got.entropy, torch.special.entr(p).sum(-1), atol=1e-5, rtol=1e-5)


def test_clean_confidence_of_a_sampled_token() -> None:
    """LLaDA takes the proposal's probability from the logits without noise or temperature."""
    z = logits(200, 19, 1.0)
    got = stats(z, parameters(200, 2.0))
    assert got.token.tolist() != z.argmax(dim=-1).tolist()
    expected = z.double().softmax(-1).gather(1, got.token[:, None])[:, 0]
    torch.testing.assert_close(got.prob, expected, atol=1e-7, rtol=1e-6)


@given(
    st.integers(1, 30),
    st.integers(2, 7),
    st.sampled_from([0.0, 0.7]),
    st.booleans(),
    st.sampled_from([0, 3]),
)
def test_chunks_change_nothing(
    rows: int, step: int, temperature: float, tempered: bool, top_k: int
) -> None:
    z, given_params = logits(rows, 11), parameters(rows, temperature, 0.9, top_k, tempered)
    whole = stats(z, given_params)
    parts = [
        stats(z[low : low + step], given_params[low : low + step]) for low in range(0, rows, step)
    ]
    joined = TokenStats.concat(parts)
    assert torch.equal(joined.token, whole.token)
    assert torch.equal(joined.prob, whole.prob)
    assert joined.entropy is not None
    assert whole.entropy is not None
    assert torch.equal(joined.entropy, whole.entropy)


@given(
    st.integers(0, 1000),
    st.sampled_from([0.01, 0.3, 0.6, 0.95, 1.0]),
    st.sampled_from([0, 1, 2, 5, 90]),
)
def test_filters_are_dreams(seed: int, top_p: float, top_k: int) -> None:
    z = logits(4, 13, seed=seed)
    got = filter_logits(z, torch.full((4,), top_p, dtype=torch.float64), torch.full((4,), top_k))
    expected = dream.filtered(z, top_p, top_k or None)
    assert torch.equal(got.isinf(), expected == torch.finfo(torch.float32).min)
    assert torch.equal(got[~got.isinf()], z[~got.isinf()])
    assert bool((got.argmax(dim=-1) == z.argmax(dim=-1)).all())


def test_filters_differ_per_row() -> None:
    z = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().repeat(4, 1)
    top_p = torch.tensor([1.0, 0.5, 1.0, 0.3], dtype=torch.float64)
    got = filter_logits(z, top_p, torch.tensor([0, 0, 3, 2]))
    assert (~got.isinf()).sum(dim=-1).tolist() == [4, 2, 3, 1]
