"""Inputs and questions of a decision: what they become, and what is refused with which words."""

import json
from pathlib import Path
from typing import Any

import pytest

from dllmserve.decisions.inputs import read_input
from dllmserve.decisions.questions import Question, read_questions
from dllmserve.errors import DecisionError, InvalidRequestError

TRUTH = json.loads((Path(__file__).parents[1] / "truth" / "decisions.json").read_text())
PAIRS = {p["name"]: p for p in TRUTH["pairs"] if p["path"] == "/v1/decisions"}
ASK = {"type": "predicate", "instructions": "It rains."}


def test_an_input_of_one_text_is_that_text() -> None:
    assert read_input("  Hi\n") == "  Hi\n"
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert read_input([{"role": "user", "content": "Hi"}]) == "Hi"
    assert read_input([{"role": "user", "type": "message", "content": parts}]) == "a\nb"


def test_a_conversation_becomes_headed_paragraphs() -> None:
    name = "messages with a JSON part and a tool result; several questions; one refusal"
    assert read_input(PAIRS[name]["request"]["input"]) == (
        "[developer]\nYou check orders.\n\n"
        "[user]\nIs this order complete?\n"
        '{"order": 17, "items": [{"sku": "AB123", "qty": 2}], "paid": true}\n\n'
        '[call c1 of stock]\n{"sku": "AB123"}\n\n'
        '[result of c1]\n{"left": 5}'
    )
    given = [
        {"role": "system", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "assistant", "phase": "commentary", "content": "Well."},
        {
            "role": "assistant",
            "content": [
                {"type": "output_text", "text": "Yes"},
                {"type": "refusal", "refusal": "I will not."},
            ],
        },
        {"type": "custom_tool_call", "call_id": "x", "name": "run", "input": "ls", "status": None},
        {
            "type": "custom_tool_call_output",
            "call_id": "x",
            "output": [{"type": "input_text", "text": "a.txt"}],
        },
    ]
    assert read_input(given) == (
        "[system]\nBe brief.\n\n[assistant]\nWell.\n\n[assistant]\nYes\nI will not.\n\n"
        "[call x of run]\nls\n\n[result of x]\na.txt"
    )


def deep(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


def as_part(data: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "input_json", "data": data}]}]


def test_json_parts_are_bounded_as_documented() -> None:
    assert read_input(as_part(deep(32))).startswith('{"a": {"a"')
    assert read_input(as_part([{"a": "ä"}])) == '[{"a": "ä"}]'
    read_input(as_part({"a": list(range(9_998))}))  # 10,000 with the object and the list
    read_input(as_part({"a": "x" * (256 * 1024 - 8)}))
    cases = [
        (deep(33), "has more than 32 lists and objects in each other"),
        ({"a": list(range(9_999))}, "holds more than 10000 values"),
        ({"a": "x" * (256 * 1024 - 7)}, "has 262145 bytes of JSON, over the limit of 262144"),
        ("text", "expected an object or a list of objects"),
        ([1], "expected an object or a list of objects"),
        ({"a": float("nan")}, "is no JSON"),
        ({"a": "\ud800"}, "lone surrogate"),
        ({"a": object()}, "is no JSON"),
    ]
    for data, text in cases:
        with pytest.raises(DecisionError, match=text) as info:
            read_input(as_part(data))
        assert info.value.param == "input[0].content[0].data"
    endless: dict[str, Any] = {}
    endless["a"] = endless
    with pytest.raises(DecisionError, match="more than 32"):
        read_input(as_part(endless))


WRONG_INPUTS = [
    (None, "input", "expected a list, got null"),
    (5, "input", "expected a list, got 5"),
    ([], "input", "expected at least 1 item, got 0"),
    ("\ud800", "input", "lone surrogate"),
    (["a"], "input[0]", "expected an object"),
    ([{"role": "user"}], "input[0].content", "is missing"),
    ([{"content": "a"}], "input[0].role", "is missing"),
    ([{"role": "tool", "content": "a"}], "input[0].role", "expected one of user, developer"),
    ([{"role": "question", "content": "a"}], "input[0].role", "expected one of user, developer"),
    ([{"role": "user", "content": None}], "input[0].content", "expected a list, got null"),
    ([{"role": "user", "content": "a", "extra": 1}], "input[0].extra", "is not known"),
    ([{"type": "file", "id": "a"}], "input[0].type", "expected one of message, function_call"),
    ([{"type": ["a"]}], "input[0].type", "expected one of message, function_call"),
    (
        [{"role": "user", "content": [{"type": "input_audio"}]}],
        "input[0].content[0].type",
        "expected one of input_text, input_json, input_image, got 'input_audio'",
    ),
    (
        [{"role": "system", "content": [{"type": "input_json", "data": {}}]}],
        "input[0].content[0].type",
        "expected one of input_text, got 'input_json'",
    ),
    (
        [{"type": "function_call", "call_id": "c", "name": "f"}],
        "input[0].arguments",
        "is missing",
    ),
    (
        [
            {"type": "custom_tool_call", "call_id": "c", "name": "f", "input": ""},
            {"type": "function_call_output", "call_id": "c", "output": ""},
        ],
        "input[1].call_id",
        'no call "c" in the input',
    ),
    (
        [
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": ""},
            {
                "type": "function_call_output",
                "call_id": "c",
                "output": [{"type": "input_image", "image_url": "x"}],
            },
        ],
        "input[1].output[0]",
        "images are not supported by this model",
    ),
]


@pytest.mark.parametrize(("given", "param", "text"), WRONG_INPUTS)
def test_wrong_inputs_are_refused_with_their_place(given: Any, param: str, text: str) -> None:
    with pytest.raises(DecisionError) as info:
        read_input(given)
    assert info.value.param == param
    assert str(info.value).startswith(f"{param}: ") and text in str(info.value)
    assert isinstance(info.value, InvalidRequestError) and info.value.code == "invalid_decision"


def choice(*values: Any, **more: Any) -> dict[str, Any]:
    choices = [{"value": value} for value in values]
    return {"type": "choice", "instructions": "Which?", "choices": choices, **more}


def levels(*labels: str) -> dict[str, Any]:
    return {"type": "score", "instructions": "?", "levels": [{"label": label} for label in labels]}


def test_questions_keep_their_values_and_names() -> None:
    for pair in PAIRS.values():
        asked = pair["request"]["questions"]
        read = read_questions(asked)
        assert [(q.kind, q.name) for q in read] == [(a["type"], a.get("name")) for a in asked]
        for question, given in zip(read, asked, strict=True):
            if given["type"] == "choice":
                assert [o.value for o in question.options] == [c["value"] for c in given["choices"]]
                described = [c.get("description") for c in given["choices"]]
                assert [o.description for o in question.options] == described
    (flag,) = read_questions([choice(True, False, "true", "no")])
    # what would look alike is told apart
    assert [o.text for o in flag.options] == ["true", "false", '"true"', "no"]
    (plain,) = read_questions([choice("true", "false", name=None)])
    assert [o.text for o in plain.options] == ["true", "false"]
    parts = [{"type": "input_text", "text": "Is"}, {"type": "input_json", "data": {"a": 1}}]
    assert read_questions([{**ASK, "instructions": parts}])[0].instructions == 'Is\n{"a": 1}'
    (rain,) = read_questions([ASK])
    assert rain.kind == "predicate" and [o.value for o in rain.options] == [True, False]


def test_as_many_as_documented_are_taken() -> None:
    assert len(read_questions([ASK] * 400)) == 400
    (wide,) = read_questions([choice(*map(str, range(255)))])
    assert isinstance(wide, Question) and len(wide.options) == 255


WRONG_QUESTIONS = [
    ("x", "questions", "expected a list, got 'x'"),
    ([], "questions", "expected 1 to 400 items, got 0"),
    ([ASK] * 401, "questions", "expected 1 to 400 items, got 401"),
    ([5], "questions[0]", "expected an object"),
    ([{}], "questions[0].type", "expected one of predicate, choice, score, got null"),
    ([ASK, {"type": "box"}], "questions[1].type", "got 'box'"),
    ([{"type": "predicate"}], "questions[0].instructions", "is missing"),
    ([{**ASK, "instructions": " \n"}], "questions[0].instructions", "is empty"),
    ([{**ASK, "instructions": []}], "questions[0].instructions", "is empty"),
    ([{**ASK, "choices": []}], "questions[0].choices", "is not known"),
    ([{**ASK, "k" * 10**6: 1}], "questions[0]." + "k" * 60, "is not known"),
    ([{**ASK, "name": 5}], "questions[0].name", "expected a text, got 5"),
    (
        [{**ASK, "instructions": [{"type": "input_image", "image_url": "x"}]}],
        "questions[0].instructions[0]",
        "images are not supported by this model",
    ),
    ([choice("a")], "questions[0].choices", "expected 2 to 255 items, got 1"),
    ([choice(*map(str, range(256)))], "questions[0].choices", "expected 2 to 255 items, got 256"),
    ([choice("a", "b", "a")], "questions[0].choices", 'value "a" is given twice'),
    ([choice("true", True, True)], "questions[0].choices", "value true is given twice"),
    ([choice("a", 5)], "questions[0].choices[1].value", "expected a text, got 5"),
    ([choice("a", "")], "questions[0].choices[1].value", "is empty"),
    ([levels("a")], "questions[0].levels", "expected 2 to 255 items, got 1"),
    ([levels("a", "")], "questions[0].levels[1].label", "is empty"),
    (
        [{**choice("a"), "choices": [{"value": "a", "description": 1}, {"value": "b"}]}],
        "questions[0].choices[0].description",
        "expected a text, got 1",
    ),
]


@pytest.mark.parametrize(("given", "param", "text"), WRONG_QUESTIONS)
def test_wrong_questions_are_refused_with_their_place(given: Any, param: str, text: str) -> None:
    with pytest.raises(DecisionError) as info:
        read_questions(given)
    assert info.value.param == param
    assert str(info.value).startswith(f"{param}: ") and text in str(info.value)
