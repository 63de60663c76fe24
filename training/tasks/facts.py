"""Tasks that read facts out of the prompt: record lookup, stories, and extraction to JSON."""

from __future__ import annotations

import json as jsonlib
import random

from training.tasks.base import Item
from training.tasks.vocab import CITIES, COLORS, FOODS, JOBS, NAMES, OBJECTS, PETS, ROOMS, SURNAMES

FORMS = (("job",), ("city",), ("job", "city"), ("job", "city", "age"))


def needle(rng: random.Random, level: int, most: int = 8, number_keys: float = 0.25) -> Item:
    """Show one to ``most`` of ``level`` rows of a table, by first name or (a harder key) by a
    number of three digits.

    The first value stands right after the key, so that a lookup is a single step of attention.
    """
    by_number = rng.random() < number_keys
    keys = (
        [str(k) for k in rng.sample(range(100, 1000), level)]
        if by_number
        else rng.sample(NAMES, level)
    )
    form = rng.choice(FORMS)
    records: dict[str, str] = {}
    for key in keys:
        values = {
            "job": rng.choice(JOBS),
            "city": rng.choice(CITIES),
            "age": str(rng.randrange(18, 90)),
        }
        records[key] = " ".join([key, *(values[field] for field in form)])
    # Asking for fewer than all keeps the answer from being found by elimination.
    wanted = rng.sample(keys, rng.randrange(1, min(most, level // 2 + 1) + 1))
    if most == 8 and level <= 24 and rng.random() < 0.5:
        # Training only: many questions about few records, which is what makes the lookup heads
        # form.
        wanted = rng.choices(keys, k=rng.randrange(level, 2 * level + 9))
    asked = "\n".join(wanted)
    prompt = f"Records:\n{chr(10).join(records.values())}\nShow the records of:\n{asked}"
    return Item("needle", prompt, "\n".join(records[key] for key in wanted), prompt)


def needle_eval(rng: random.Random, level: int) -> Item:
    """The held-out form: at most three records asked for, by name."""
    return needle(rng, level, most=3, number_keys=0.0)


def number_eval(rng: random.Random, level: int) -> Item:
    """The same with numbers as keys."""
    return needle(rng, level, most=3, number_keys=1.0)


def story(rng: random.Random, level: int) -> Item:
    """People walk, take and drop things; where is a thing or a person at the end?"""
    people = rng.sample(NAMES, rng.randrange(2, 5))
    things = rng.sample(OBJECTS, rng.randrange(1, 4))
    rooms = rng.sample(ROOMS, rng.randrange(3, 7))
    place = {name: rng.choice(rooms) for name in [*people, *things]}
    holder: dict[str, str] = {}
    lines = [f"{p} is in the {place[p]}." for p in people] + [
        f"The {t} is in the {place[t]}." for t in things
    ]
    events = rng.randrange(2, 9)
    lines += [_event(rng, people, things, rooms, place, holder) for _ in range(events)]
    if rng.random() < 0.2:
        who = rng.choice(people)
        question, answer = f"Where is {who}?", f"{who} is in the {place[who]}."
    else:
        thing = rng.choice([t for t in things if t in holder] or things)
        owner = holder.get(thing)
        question = f"Where is the {thing}?"
        answer = f"The {thing} is with {owner or 'nobody'}. "
        if owner:
            # The hop is spelled out: first the holder, then where the holder is.
            answer += f"{owner} is in the {place[owner]}. "
        answer += f"The {thing} is in the {place[thing]}."
    prompt = " ".join([*lines, question])
    return Item("story", prompt, answer, prompt)


def _event(
    rng: random.Random,
    people: list[str],
    things: list[str],
    rooms: list[str],
    place: dict[str, str],
    holder: dict[str, str],
) -> str:
    """Let somebody take, drop or walk; updates places and holders."""
    who = rng.choice(people)
    near = [t for t in things if t not in holder and place[t] == place[who]]
    mine = [t for t in things if holder.get(t) == who]
    roll = rng.random()
    if near and roll < 0.6:
        thing = rng.choice(near)
        holder[thing] = who
        return f"{who} takes the {thing}."
    if mine and roll < 0.75:
        thing = rng.choice(mine)
        del holder[thing]
        return f"{who} drops the {thing} in the {place[who]}."
    # Walking towards a thing more often than not makes most stories need more than one hop.
    target = place[rng.choice(things)] if rng.random() < 0.5 else rng.choice(rooms)
    if target == place[who]:
        target = rng.choice([room for room in rooms if room != place[who]])
    place[who] = target
    for thing in mine:
        place[thing] = target
    return f"{who} walks to the {target}."


_SENTENCES: dict[str, tuple[str, ...]] = {
    "name": (
        "My neighbour is called {}.",
        "This is about {}.",
        "The name is {}.",
        "Please meet {}.",
    ),
    "age": ("The age is {}.", "The last birthday was number {}.", "That makes {} years so far."),
    "city": ("The home is in {}.", "The flat in {} is small.", "Life in {} is good."),
    "color": (
        "The favourite color is {}.",
        "The front door is {}.",
        "Everything there is painted {}.",
    ),
    "pet": ("A {} lives there too.", "There is also a {}.", "The pet is a {}."),
    "job": ("The job is {}.", "For a living, it is the work of a {}.", "The badge says {}."),
    "food": ("Dinner is mostly {}.", "The best meal is {}.", "There is always {} on the table."),
    "thing": ("A {} stands on the shelf.", "The oldest thing is a {}.", "The present was a {}."),
}
_NOISE = (
    "The weather was fine.",
    "It was a long day.",
    "We talked for an hour.",
    "The train was late again.",
)


def json(rng: random.Random, level: int) -> Item:
    """Extract three to five named fields of a short description as a JSON object."""
    values: dict[str, str | int] = {
        "name": f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}",
        "age": rng.randrange(18, 90),
        "city": rng.choice(CITIES),
        "color": rng.choice(COLORS),
        "pet": rng.choice(PETS),
        "job": rng.choice(JOBS),
        "food": rng.choice(FOODS),
        "thing": rng.choice(OBJECTS),
    }
    present = rng.sample(sorted(values), rng.randrange(4, 8))
    fields = rng.sample(present, rng.randrange(3, min(5, len(present)) + 1))
    lines = [rng.choice(_SENTENCES[field]).format(values[field]) for field in present]
    if rng.random() < 0.3:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(_NOISE))
    prompt = f"Extract {', '.join(fields)} as JSON: {' '.join(lines)}"
    return Item("json", prompt, jsonlib.dumps({field: values[field] for field in fields}), prompt)
