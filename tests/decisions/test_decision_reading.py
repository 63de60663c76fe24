"""From questions to probabilities: labels, prompts, canvases, rounds; read by the slow oracle."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dllmserve.decisions.answers import confidence, score
from dllmserve.decisions.labels import LabelMaker
from dllmserve.decisions.questions import Question, predicate, read_questions
from dllmserve.decisions.reading import How, _turn, decide
from dllmserve.decisions.template import Page, Reading, Template
from dllmserve.engine.tokenizer import Tokenizer, load_tokenizer
from dllmserve.errors import (
    ContextLengthError,
    InvalidParameterError,
    PromptError,
    TokenizerError,
)
from dllmserve.models.loader import find_model
from tests.checkpoints import write_byte_model
from tests.oracles.decisions import read
from tests.oracles.models import OracleModel, load

#: the tokenizer of bytes has one token for each, and its chats end with this one
END = 256
TEXT = "The parcel arrived with a broken lid."


def choice(count: int, asked: str = "Which?") -> Question:
    values = [{"value": f"v{i}"} for i in range(count)]
    return read_questions([{"type": "choice", "instructions": asked, "choices": values}])[0]


def scale(count: int) -> Question:
    levels = [{"label": f"l{i}"} for i in range(count)]
    return read_questions([{"type": "score", "instructions": "How?", "levels": levels}])[0]


MIXED = [predicate("It is broken."), choice(4), scale(3), choice(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaDA over bytes, with room for long prompts."""
    return write_byte_model(tmp_path_factory.mktemp("decisions") / "bytes", max_len=4096)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    found = load_tokenizer(folder)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    found = load_tokenizer(find_model("tiny"))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def model(folder: Path) -> OracleModel:
    return load(folder)


@pytest.fixture(scope="module")
def template(tokenizer: Tokenizer) -> Template:
    return Template(tokenizer, END, 4096)


class Reader:
    """Runs decide() by the oracle, and remembers what was read."""

    def __init__(self, model: OracleModel) -> None:
        self.model = model
        self.rounds: list[list[Reading]] = []

    def run(
        self,
        template: Template,
        questions: Sequence[Question],
        how: How,
        *,
        together: bool = True,
        input: str = TEXT,
    ) -> list[list[float]]:
        steps = decide(template, input, questions, how, together=together)
        found: Any = None
        while True:
            try:
                readings = steps.send(found)
            except StopIteration as stop:
                chances: list[list[float]] = stop.value
                return chances
            self.rounds.append(readings)
            found = [read(self.model, r.ids, r.holes, r.asked) for r in readings]


def close(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> bool:
    return all(x == pytest.approx(y, abs=1e-6) for x, y in zip(a, b, strict=True))


def maker(tokenizer: Tokenizer) -> LabelMaker:
    return LabelMaker(lambda text: tokenizer.encode(text, special=False))


def test_labels_are_single_tokens_where_there_are_such(tiny: Tokenizer) -> None:
    made = maker(tiny)
    assert made.labels(scale(10)).names == tuple("0123456789")
    assert made.labels(scale(11)).names == tuple("ABCDEFGHIJK")
    assert made.labels(choice(3)).names == ("A", "B", "C")
    for question in (scale(2), choice(25)):
        labels = made.labels(question)
        for name, code in zip(labels.names, labels.codes, strict=True):
            for number in (1, 7, 42, 400):
                ids, slots = made.line(number, labels)
                for slot, id in zip(slots, code, strict=True):
                    ids[slot] = id
                assert tiny.encode(f"{number}: {name}\n", special=False) == ids


@pytest.mark.parametrize("which", ["bytes", "tiny"])
def test_255_options_have_labels_of_two_tokens(
    which: str, tokenizer: Tokenizer, tiny: Tokenizer
) -> None:
    chosen = tiny if which == "tiny" else tokenizer
    labels = maker(chosen).labels(choice(255))
    assert labels.names[:2] == ("A A", "A B") and len(labels.names) == 255
    assert len(set(labels.codes)) == 255 and all(len(code) == 2 for code in labels.codes)
    ids, slots = maker(chosen).line(12, labels)
    ids[slots[0]], ids[slots[1]] = labels.codes[100]
    assert chosen.encode(f"12: {labels.names[100]}\n", special=False) == ids


def words(text: str) -> list[int]:
    """A tokenizer of whole words, blanks between them left out."""
    known = text.replace("\n", " \n").split(" ")
    return [hash(word) for word in known]


def test_a_large_vocabulary_has_single_tokens_for_all() -> None:
    made = LabelMaker(words)
    labels = made.labels(choice(255))
    assert labels.names[25:28] == ("Z", "AA", "AB") and all(len(c) == 1 for c in labels.codes)
    assert made.labels(predicate("?")).names == ("yes", "no")
    assert made.labels(predicate("?")).fixed


def test_a_tokenizer_without_labels_is_refused() -> None:
    with pytest.raises(TokenizerError, match="no single tokens for A and B"):
        LabelMaker(lambda text: [len(text)]).labels(choice(3))
    # it knows A and B, and reads anything else as the same
    few = LabelMaker(lambda text: [1, 2, ord(text[3]) if text[3] in "AB" and len(text) == 5 else 0])
    assert few.labels(choice(2)).names == ("A", "B")
    with pytest.raises(TokenizerError, match="too few for 3 options"):
        few.labels(choice(3))
    odd = LabelMaker(lambda text: [*text.encode()] if text[0] == "1" else [len(text)])
    with pytest.raises(TokenizerError, match="in another way"):
        odd.line(2, odd.labels(choice(2)))


def only_page(template: Template, questions: Sequence[Question], turns: Sequence[int]) -> Page:
    (page,) = template.pages(TEXT, questions, turns, 1)
    return page


def test_the_prompt_is_as_documented(tokenizer: Tokenizer, template: Template) -> None:
    page = only_page(template, MIXED, [0] * 4)
    reading, holes = page.together(range(4), {})
    text = tokenizer.decode(reading.ids)
    assert text == (
        "Read the text. Then answer every question about it with the label of one of its options."
        f"\n\nText:\n{TEXT}\n\n"
        "Question 1: It is broken.\nA: yes\nB: no\n\n"
        "Question 2: Which?\nA: v0\nB: v1\nC: v2\nD: v3\n\n"
        "Question 3: How?\n0: l0\n1: l1\n2: l2\n\n"
        "Question 4: Which?\nA: v0\nB: v1\nC: v2\n\n"
        "Answer with a line for each question: its number, a colon and the label."
        "1: A\n2: A\n3: 0\n4: A\n"
    )
    assert reading.ids[-1] == END and holes == [0, 1, 2, 3]
    assert [tokenizer.decode([reading.ids[h]]) for h in reading.holes] == ["A", "A", "0", "A"]


def test_words_answer_predicates_where_they_are_tokens() -> None:
    from dllmserve.decisions.template import _block

    made = LabelMaker(words)
    plain, told = predicate("It rains."), predicate("", yes="it rains", no=None)
    assert _block(plain, made.labels(plain), 0) == "It rains. (yes or no)"
    assert _block(plain, made.labels(plain), 1) == "It rains. (no or yes)"
    assert _block(told, made.labels(told), 0) == "yes: it rains\nno"
    assert _block(told, made.labels(told), 1) == "no\nyes: it rains"


def test_turned_options_take_their_labels_or_leave_them(tokenizer: Tokenizer) -> None:
    from dllmserve.decisions.template import _block

    made = maker(tokenizer)
    letters, digits = made.labels(choice(3)), made.labels(scale(3))
    assert _block(choice(3), letters, 1) == "Which?\nA: v1\nB: v2\nC: v0"
    assert _block(scale(3), digits, 1) == "How?\n1: l1\n2: l2\n0: l0"
    page = only_page(Template(tokenizer, END, 4096), [choice(3), scale(3)], [1, 1])
    code = dict(zip(letters.names, letters.codes, strict=True))
    assert page.lines[0].codes == (code["C"], code["A"], code["B"])
    assert page.lines[1].codes == digits.codes


def test_control_tokens_in_texts_are_text(tokenizer: Tokenizer) -> None:
    page = Template(tokenizer, END, 4096).pages("<|end|><|user|>", [choice(2, "<|end|>")], [0], 1)
    assert page[0].prompt.count(END) == 1  # the template's own, behind the message


def test_without_a_chat_template_the_answer_follows_the_text(tmp_path: Path) -> None:
    from tests.checkpoints import byte_tokenizer

    byte_tokenizer(tmp_path, chat=False)
    plain = load_tokenizer(tmp_path)
    assert plain is not None
    page = only_page(Template(plain, END, 4096), [predicate("It rains.")], [0])
    reading, _ = page.together([0], {})
    assert plain.decode(reading.ids).endswith("a colon and the label.\n\n1: A\n")
    assert END not in reading.ids


@pytest.mark.parametrize("together", [True, False])
def test_parallel_reading_takes_one_round(
    model: OracleModel, template: Template, together: bool
) -> None:
    reader = Reader(model)
    found = reader.run(template, MIXED, How(), together=together)
    assert [len(chances) for chances in found] == [2, 4, 3, 3]
    assert all(sum(chances) == pytest.approx(1, abs=1e-12) for chances in found)
    (first,) = reader.rounds
    assert len(first) == (1 if together else 4)
    page = only_page(template, MIXED, [0] * 4)
    if together:  # the same by hand
        row, slots, at = list(page.prompt), [], len(page.prompt)
        for line in page.lines.values():
            slots.append(at + line.slots[0])
            row, at = row + line.ids, at + len(line.ids)
        codes = [[c[0] for c in line.codes] for line in page.lines.values()]
        logs = read(model, [*row, END], slots, codes)
        for own, chances in zip(logs, found, strict=True):
            weights = [math.exp(log) for log in own]
            assert chances == pytest.approx([w / sum(weights) for w in weights], rel=1e-9)
    else:
        assert all(r.holes == (len(r.ids) - 1,) for r in first)
        assert [r.ids[: len(page.prompt)] for r in first] == [page.prompt] * 4
        assert len({len(r.ids) for r in first}) == 1  # no other line is there


@pytest.mark.parametrize("together", [True, False])
def test_sequential_reading_sees_the_answers_before(
    model: OracleModel, template: Template, together: bool
) -> None:
    reader = Reader(model)
    found = reader.run(template, MIXED, How("sequential"), together=together)
    assert [len(readings) for readings in reader.rounds] == [1] * 4
    page = only_page(template, MIXED, [0] * 4)
    written: dict[int, tuple[int, ...]] = {}
    for number, (reading,) in enumerate(reader.rounds):
        line = page.lines[number]
        expected = page.together([number], written)[0] if together else page.alone(number, written)
        assert reading == expected
        hole = next(i for i, asked in enumerate(reading.asked) if asked)
        (logs,) = [read(model, reading.ids, reading.holes, reading.asked)[hole]]
        best = max(range(len(logs)), key=logs.__getitem__)
        assert best == max(range(len(logs)), key=found[number].__getitem__)
        written[number] = line.codes[best]
    assert not close(found, Reader(model).run(template, MIXED, How(), together=together))


@pytest.mark.parametrize("together", [True, False])
def test_labels_of_two_slots_are_read_one_slot_after_the_other(
    model: OracleModel, template: Template, together: bool
) -> None:
    """Exact: a label's chance is that of its first token times that of its second behind it."""
    reader, wide = Reader(model), choice(60)
    (found,) = reader.run(template, [wide], How(), together=together)
    assert len(found) == 60 and sum(found) == pytest.approx(1, abs=1e-12)
    assert [len(readings) for readings in reader.rounds] == [1, 3]  # A _, B _, C _
    page = only_page(template, [wide], [0])
    line = page.lines[0]
    joint = []
    for code in line.codes:
        chain = 0.0
        for depth in range(2):
            written = {0: code[:depth]}
            reading = page.together([0], written)[0] if together else page.alone(0, written)
            (at,) = [i for i, asked in enumerate(reading.asked) if asked]
            logs = read(model, reading.ids, reading.holes, reading.asked)[at]
            log = logs[reading.asked[at].index(code[depth])]
            chain += log
        joint.append(math.exp(chain))
    assert found == pytest.approx([j / sum(joint) for j in joint], abs=1e-6)


def test_orders_are_averaged_over_turns_of_the_list(model: OracleModel, template: Template) -> None:
    questions = [choice(4), predicate("It is broken.")]
    together = Reader(model).run(template, questions, How(orders=4))
    alone = []
    for turns in ([0, 0], [1, 1], [2, 0], [3, 1]):
        page = only_page(template, questions, turns)
        reading, _ = page.together([0, 1], {})
        logs = read(model, reading.ids, reading.holes, reading.asked)
        chances = []
        for number, own in enumerate(logs):
            by_id = dict(zip(reading.asked[number], own, strict=True))
            weights = [math.exp(by_id[c[0]]) for c in page.lines[number].codes]
            chances.append([w / sum(weights) for w in weights])
        alone.append(chances)
    mean = [sum(turned[0][i] for turned in alone) / 4 for i in range(4)]
    assert together[0] == pytest.approx(mean, abs=1e-6)
    assert [_turn(order, 4, 2) for order in range(4)] == [0, 1, 0, 1]
    assert [_turn(order, 3, 255) for order in range(3)] == [0, 85, 170]
    one, three = (
        Reader(model).run(template, [predicate("Hm.")], How(orders=orders)) for orders in (2, 3)
    )
    assert close(one, three)  # turns 0, 1 and 0, 1, 0: each counts once


def test_order_does_not_matter_when_all_turns_are_averaged(
    model: OracleModel, template: Template
) -> None:
    """The answer of a turned list is the turned answer."""
    values = ["red", "green", "blue"]

    def ask(values: list[str]) -> dict[str, float]:
        given = [{"value": v} for v in values]
        asked = {"type": "choice", "instructions": "Colour?", "choices": given}
        (found,) = Reader(model).run(template, read_questions([asked]), How(orders=3))
        return dict(zip(values, found, strict=True))

    first, second = ask(values), ask(["blue", "red", "green"])
    assert all(first[v] == pytest.approx(second[v], abs=1e-9) for v in values)


@pytest.mark.parametrize("count", [1, 100, 400])
def test_many_questions_are_one_canvas_where_they_fit(
    model: OracleModel, tokenizer: Tokenizer, count: int
) -> None:
    questions = [predicate(f"{i}?") for i in range(count)]
    roomy = Template(tokenizer, END, 20_000)
    (page,) = roomy.pages(TEXT, questions, [0] * count, 1)
    reading, holes = page.together(range(count), {})
    assert holes == list(range(count)) and len(reading.holes) == count
    assert [len(asked) for asked in reading.asked] == [2] * count


def test_what_does_not_fit_is_read_on_several_pages(
    model: OracleModel, tokenizer: Tokenizer
) -> None:
    small = Template(tokenizer, END, 600)
    questions = [predicate(f"Is it {i}?") for i in range(30)]
    pages = small.pages(TEXT, questions, [0] * 30, 30)
    assert len(pages) > 2 and all(len(page) <= 600 for page in pages)
    assert [number for page in pages for number in page.lines] == list(range(30))
    found = Reader(model).run(small, questions, How())
    # each page is what a request with its questions alone would be
    some = list(pages[1].lines)
    again = Reader(model).run(small, [questions[n] for n in some], How())
    assert close(again, [found[n] for n in some])
    with pytest.raises(ContextLengthError, match="need more than 2 prompts of 600 tokens"):
        small.pages(TEXT, questions, [0] * 30, 2)
    with pytest.raises(InvalidParameterError, match="reading='sequential' needs all questions"):
        Reader(model).run(small, questions, How("sequential"))


def test_what_never_fits_is_refused_with_its_numbers(tokenizer: Tokenizer) -> None:
    small = Template(tokenizer, END, 300)
    with pytest.raises(ContextLengthError, match=r"questions\[0\] take \d+ tokens, over the 300"):
        small.pages("a" * 200, [predicate("b")], [0], 9)
    with pytest.raises(ContextLengthError, match=r"questions\[1\] take \d+ tokens"):
        small.pages("a", [predicate("b"), predicate("b" * 200)], [0, 0], 9)
    with pytest.raises(ContextLengthError, match="have 5009 characters, over the 4800 that 300"):
        small.pages("a" * 5000, [predicate("bcde")], [0], 9)
    with pytest.raises(PromptError, match="not valid Unicode"):
        small.pages("\ud800", [predicate("b")], [0], 9)


def test_a_round_is_bounded(template: Template) -> None:
    steps = decide(template, TEXT, [choice(200)], How(), together=True, most=3)
    first = next(steps)
    logs = [[[-1.0] * len(asked) for asked in r.asked] for r in first]
    with pytest.raises(InvalidParameterError, match="take 8 canvases at once, over the 3"):
        steps.send(logs)
    with pytest.raises(InvalidParameterError, match="take 4 canvases at once, over the 3"):
        next(decide(template, TEXT, MIXED, How(), together=False, most=3))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"reading": "both"}, "reading must be one of 'parallel', 'sequential'"),
        ({"orders": 0}, r"orders must be an integer in \[1, 32\], got 0"),
        ({"orders": 33}, "orders must be an integer"),
        ({"orders": True}, "orders must be an integer"),
    ],
)
def test_how_is_checked(given: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidParameterError, match=text):
        How(**given)


def test_confidence_and_score() -> None:
    assert confidence([0.97, 0.01, 0.02]) == pytest.approx(0.955)
    assert confidence([0.8, 0.05, 0.15]) == pytest.approx(0.7)
    assert confidence([0.25] * 4) == 0 and confidence([1.0]) == 1
    assert confidence([1 / 3, 1 / 3, 1 / 3]) >= 0
    assert score([0.3, 0.65, 0.05]) == pytest.approx(0.75)
