"""Rules and refresh policies on a CUDA device, with and without graphs, against slow twins."""

from pathlib import Path

import pytest

from dllmserve import LLM
from tests.checkpoints import write_random
from tests.engine.test_fewer_forwards import LENGTHS, SHAPES, cases, expected, sampling
from tests.helpers import check_idle, random_prompt


@pytest.mark.parametrize("early", [False, True], ids=["whole", "early"])
@pytest.mark.parametrize("name", SHAPES)
def test_rules_and_policies(tmp_path: Path, name: str, early: bool) -> None:
    """All cases at once, in changing company."""
    folder, shape = write_random(tmp_path / name, SHAPES[name]), SHAPES[name]
    listed = cases(early)
    prompts = [random_prompt(place, 1 + 5 * place % 17) for place in range(len(listed))]
    answers = [
        expected(folder, prompt, options, shape.eos_ids).tokens
        for prompt, (_, _, options) in zip(prompts, listed, strict=True)
    ]
    llm = LLM(
        str(folder), device="cuda", dtype="float32", kv_pages=400, page_size=5, max_num_seqs=16
    )
    params = [sampling(options) for _, _, options in listed]
    for _ in range(3):
        outputs = llm.generate(prompts, params, use_tqdm=False)
        check_idle(llm)
        for case, output, ids in zip(listed, outputs, answers, strict=True):
            assert output["token_ids"] == ids, case


@pytest.mark.parametrize("rule", ["klass", "credit", "wino", "hierarchy"])
def test_one_rule_replayed(tmp_path: Path, rule: str) -> None:
    """A batch of one rule and policy, step after step from graphs."""
    shape = SHAPES["dream"]
    folder = write_random(tmp_path / "dream", shape)
    llm = LLM(str(folder), device="cuda", dtype="float32", kv_pages=400, page_size=5)
    for policy in ("dual", "delayed", "drift-often", "dual-window"):
        found = [c for c in cases(False) if c[0] == rule and c[1] == policy]
        for _, _, options in found or []:
            prompts = [random_prompt(place, 6) for place in range(6)]
            params = [sampling(options)] * 6
            answers = [
                expected(folder, prompt, options, shape.eos_ids).tokens for prompt in prompts
            ]
            for _ in range(3):
                outputs = llm.generate(prompts, params, use_tqdm=False)
                assert [o["token_ids"] for o in outputs] == answers, (rule, policy)
                assert all(len(ids) == LENGTHS["gen_length"] for ids in answers)
    graphs = llm._engine._runner.graphs
    assert graphs is not None and graphs.replays > 0
