"""Who has a place when there are too many connections, on a clock that the tests turn."""

import random
import socket
from dataclasses import dataclass, field
from typing import Any

import pytest

from dllmserve.server.http.places import (
    GRACE_S,
    PACE_S,
    ConnectionLimits,
    Connections,
    Place,
    Standing,
    group,
)


@dataclass
class Door:
    """Connections with names, and those of them that were dropped."""

    connections: Connections
    now: list[float]
    dropped: list[str] = field(default_factory=list)
    places: dict[str, Place] = field(default_factory=dict)

    def enter(self, name: str, address: str | None = "a") -> Place | None:
        self.now[0] += 1.0
        place = self.connections.enter(address, lambda: self.dropped.append(name))
        if place is not None:
            self.places[name] = place
        return place

    def begin(self, name: str, standing: str = "stranger") -> bool:
        return self.connections.begin(self.places[name], standing, ())


def door(**limits: Any) -> Door:
    """The path of a request is its sender's standing here."""
    now = [100.0]

    def judge(path: str, headers: Any) -> Standing:
        return path  # type: ignore[return-value]

    made = Connections(ConnectionLimits(**limits), judge=judge, clock=lambda: now[0])
    return Door(made, now)


def test_the_oldest_idle_one_gives_way_and_a_busy_one_never() -> None:
    full = door(max_connections=2, reserve=2)
    for name in "abcd":
        assert full.enter(name)
    assert full.begin("a")
    full.enter("e")
    full.enter("f")
    assert full.dropped == ["b", "c"]
    # a was busy and is idle again: it is the youngest now
    full.connections.rest(full.places["a"])
    for name in "ghij":
        full.enter(name)
    assert full.dropped == ["b", "c", "d", "e", "f", "a"]
    assert full.connections.stats.open == 4
    assert full.connections.stats.dropped == {"idle": 6}
    assert not full.begin("b"), "what was dropped begins nothing"


def test_the_address_with_most_idle_connections_loses_its_own() -> None:
    full = door(max_connections=4, reserve=2)
    full.enter("honest", "10.0.0.1")
    for name in "abcde":
        full.enter(name, "10.0.0.2")
    for name in "fghij":
        full.enter(name, "10.0.0.2")
    assert full.dropped == list("abcde")
    # nobody has more than others: the oldest
    equal = door(max_connections=3, reserve=0)
    for name in "xyzuvw":
        equal.enter(name, name)
    assert equal.dropped == list("xyz")


def test_when_all_are_busy_there_is_no_place() -> None:
    full = door(max_connections=2, reserve=0)
    for name in "ab":
        assert full.enter(name) and full.begin(name)
    assert full.connections.seconds_to_room() == 0
    assert full.enter("c") is None
    assert full.dropped == []
    assert full.connections.stats.dropped == {"full": 1}
    full.connections.leave(full.places["a"])
    assert full.enter("d")


def test_whoever_has_just_come_is_left_alone_for_a_moment() -> None:
    full = door(max_connections=1, reserve=1)
    for name in "ab":
        full.connections.enter("a", lambda name=name: full.dropped.append(name))
    assert full.connections.seconds_to_room() == pytest.approx(GRACE_S)
    full.now[0] += GRACE_S
    assert full.connections.seconds_to_room() == 0
    # with many of them for longer, so that making room takes a bounded share of the time
    many = door(max_connections=1000, reserve=1000)
    for _ in range(2000):
        many.connections.enter("a", lambda: None)
    assert many.connections.seconds_to_room() == pytest.approx(2000 * PACE_S)


@pytest.mark.parametrize(
    ("reserve", "keys", "probes"), [(0, 0, 0), (1, 0, 1), (2, 1, 2), (8, 4, 8), (9, 4, 9)]
)
def test_places_are_kept_for_keys_and_more_for_probes(reserve: int, keys: int, probes: int) -> None:
    full = door(max_connections=3, reserve=reserve)
    begun: dict[str, int] = {}
    for turn, standing in enumerate(("stranger", "key", "stranger", "probe", "key", "stranger")):
        for number in range(3 + reserve):
            name = f"{standing} {turn} {number}"
            if full.enter(name) is None or not full.begin(name, standing):
                break
            begun[standing] = begun.get(standing, 0) + 1
    assert begun == {
        k: n for k, n in (("stranger", 3), ("key", keys), ("probe", probes - keys)) if n
    }
    assert full.connections.stats.busy == 3 + reserve
    # one that is busy may go on, whoever it is
    assert full.begin("stranger 0 0")


def test_an_address_has_a_limit_of_its_own() -> None:
    limited = door(max_connections=9, max_per_address=2)
    limited.enter("a", "10.0.0.1")
    assert not limited.connections.crowded("10.0.0.1")
    limited.enter("b", "10.0.0.1")
    assert limited.connections.crowded("10.0.0.1")
    assert not limited.connections.crowded("10.0.0.2")
    assert not limited.connections.crowded(None)
    limited.connections.leave(limited.places["a"])
    limited.connections.leave(limited.places["a"])
    assert not limited.connections.crowded("10.0.0.1")
    assert limited.connections.stats.open == 1


@pytest.mark.parametrize(("idle", "given"), [(0, 0), (3, 3), (8, 8), (40, 20), (1000, 64)])
def test_idle_connections_give_their_files(idle: int, given: int) -> None:
    short = door(max_connections=2000)
    short.enter("busy")
    short.begin("busy")
    for number in range(idle):
        short.enter(str(number))
    assert short.connections.give_files() == given
    assert short.dropped == [str(number) for number in range(given)]
    assert short.connections.stats.open == 1 + idle - given
    assert short.connections.stats.dropped["files"] == given


def test_numbers_hold_whatever_happens() -> None:
    rng = random.Random(1)
    made = door(max_connections=5, reserve=4)
    for turn in range(5000):
        names = list(made.places)
        match rng.randrange(5):
            case 0 | 1:
                made.enter(str(turn), rng.choice(["a", "b", "c", None]))
            case 2 if names:
                made.begin(rng.choice(names), rng.choice(["stranger", "key", "probe"]))
            case 3 if names:
                made.connections.rest(made.places[rng.choice(names)])
            case 4 if names:
                made.connections.leave(made.places.pop(rng.choice(names)))
        here = [place for place in made.places.values() if not place.gone]
        stats = made.connections.stats
        assert stats.open == len(here) <= 9
        assert stats.busy == sum(place.busy for place in here)
        idle = [place for each in made.connections._idle.values() for place in each]
        assert sorted(map(id, idle)) == sorted(id(place) for place in here if not place.busy)
        assert sum(made.connections._held.values()) == len(here)
        assert all(made.connections._idle.values()) and all(made.connections._held.values())


@pytest.mark.parametrize(
    ("family", "address", "expected"),
    [
        (socket.AF_INET, ("10.1.2.3", 5), "10.1.2.3"),
        (socket.AF_INET6, ("2001:db8:a:b:c:d:e:f", 5, 0, 0), "2001:db8:a:b::/64"),
        (socket.AF_INET6, ("2001:db8:a:b::1", 9, 0, 0), "2001:db8:a:b::/64"),
        (socket.AF_INET6, ("fe80::1%eth0", 5, 0, 2), "fe80::/64"),
        (socket.AF_INET6, ("::ffff:10.1.2.3", 5, 0, 0), "10.1.2.3"),
        (socket.AF_UNIX, "", None),
    ],
)
def test_who_a_connection_counts_for(family: int, address: Any, expected: str | None) -> None:
    assert group(family, address) == expected
