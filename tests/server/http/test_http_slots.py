"""Who has a slot when there are too many connections, on a clock that the tests turn."""

import random
import socket
from dataclasses import dataclass, field
from typing import Any

import pytest

from dllmserve.server.http.slots import (
    AHEAD_S,
    GRACE_S,
    PACE_S,
    ConnectionLimits,
    Connections,
    ConnectionSlot,
    Sender,
    group,
)


@dataclass
class NamedConnections:
    """Connections with names, and those of them that were dropped."""

    connections: Connections
    now: list[float]
    dropped: list[str] = field(default_factory=list)
    slots: dict[str, ConnectionSlot] = field(default_factory=dict)

    def enter(self, name: str, address: str | None = "a") -> ConnectionSlot | None:
        self.now[0] += 1.0
        slot = self.connections.enter(address, lambda: self.dropped.append(name))
        if slot is not None:
            self.slots[name] = slot
        return slot

    def begin(self, name: str, sender: str = "client") -> bool:
        return self.connections.begin(self.slots[name], sender, ())


def named(**limits: Any) -> NamedConnections:
    """The path of a request is its sender here."""
    now = [100.0]

    def classify(path: str, headers: Any) -> Sender:
        return path  # type: ignore[return-value]

    made = Connections(ConnectionLimits(**limits), classify=classify, clock=lambda: now[0])
    return NamedConnections(made, now)


def test_the_oldest_idle_one_gives_way_and_a_busy_one_never() -> None:
    full = named(max_connections=2, reserve=2)
    for name in "abcd":
        assert full.enter(name)
    assert full.begin("a")
    full.enter("e")
    full.enter("f")
    assert full.dropped == ["b", "c"]
    # a was busy and is idle again; more of them had no answer yet
    full.connections.rest(full.slots["a"])
    full.enter("g")
    assert full.dropped == ["b", "c", "d"]
    # as many had one: by the end of their last request
    for name in "ga":
        assert full.begin(name)
        full.connections.rest(full.slots[name])
    for name in "hij":
        full.enter(name)
    assert full.dropped == ["b", "c", "d", "g", "e", "f"]
    assert full.connections.stats.open == 4
    assert full.connections.stats.dropped == {"idle": 6}
    assert not full.begin("b"), "what was dropped begins nothing"


def test_the_address_with_most_idle_connections_loses_its_own() -> None:
    full = named(max_connections=4, reserve=2)
    full.enter("honest", "10.0.0.1")
    for name in "abcde":
        full.enter(name, "10.0.0.2")
    for name in "fghij":
        full.enter(name, "10.0.0.2")
    assert full.dropped == list("abcde")
    # nobody has more than others: the oldest
    equal = named(max_connections=3, reserve=0)
    for name in "xyzuvw":
        equal.enter(name, name)
    assert equal.dropped == list("xyz")


def test_when_all_are_busy_there_is_no_place() -> None:
    full = named(max_connections=2, reserve=0)
    for name in "ab":
        assert full.enter(name) and full.begin(name)
    assert full.connections.seconds_to_room() == 0
    assert full.enter("c") is None
    assert full.dropped == []
    assert full.connections.stats.dropped == {"full": 1}
    full.connections.leave(full.slots["a"])
    assert full.enter("d")


def test_whoever_has_just_come_is_left_alone_for_a_moment() -> None:
    full = named(max_connections=1, reserve=1)
    for name in "ab":
        full.connections.enter("a", lambda name=name: full.dropped.append(name))
    assert full.connections.seconds_to_room() == pytest.approx(GRACE_S)
    full.now[0] += GRACE_S
    assert full.connections.seconds_to_room() == 0


def test_making_room_takes_a_bounded_share_of_the_time() -> None:
    full = named(max_connections=1000)
    for number in range(1128):
        full.enter(str(number))
    for _ in range(1000):
        while full.connections.seconds_to_room() == 0:
            full.connections.enter("a", lambda: None)
        full.now[0] += 0.001
    assert full.connections.stats.dropped["idle"] == pytest.approx(1000, abs=AHEAD_S / PACE_S + 2)


def test_connections_that_ask_again_and_again_make_room() -> None:
    """What a connection does changes when it goes, and not whether one of them does."""
    full = named(max_connections=64, reserve=32)
    names = [str(number) for number in range(96)]
    for name in names:
        full.enter(name)

    def ask_all() -> None:
        for name in names:
            if full.begin(name):
                full.connections.rest(full.slots[name])

    ask_all()
    for number in range(200):
        full.now[0] += PACE_S
        ask_all()
        assert full.connections.seconds_to_room() == 0, number
        assert full.connections.enter("a", lambda: full.dropped.append("new")) is not None
        if number < GRACE_S / PACE_S:
            assert "new" not in full.dropped


@pytest.mark.parametrize("seed", range(8))
def test_a_new_connection_gets_in_and_has_its_moment_whatever_others_do(seed: int) -> None:
    rng = random.Random(seed)
    full = named(max_connections=rng.choice([1, 8, 64]), reserve=rng.choice([1, 8]))
    limits, waiting = full.connections.limits, 0.0
    entered: dict[ConnectionSlot, float] = {}

    def dropped(slot: ConnectionSlot) -> None:
        if not slot.used:
            assert full.now[0] - entered[slot] >= GRACE_S - 1e-9

    def newcomer() -> None:
        box: list[ConnectionSlot] = []
        slot = full.connections.enter("a", lambda: dropped(box[0]))
        assert slot is not None, "nobody is busy"
        box.append(slot)
        entered[slot] = full.now[0]

    for _ in range(20_000):
        wait = full.connections.seconds_to_room()
        if wait == 0:
            newcomer()
            waiting = 0.0
        else:  # the listener waits
            assert (waiting := waiting + wait) <= GRACE_S + AHEAD_S + PACE_S
            full.now[0] += wait
        here = [slot for slot in entered if not slot.gone]
        for slot in rng.sample(here, rng.randint(0, min(3, len(here)))):
            match rng.randrange(3):
                case 0 | 1 if full.connections.begin(slot, "probe", ()) and rng.random() < 0.7:
                    full.connections.rest(slot)
                case 2 if rng.random() < 0.1:
                    full.connections.leave(slot)
        entered = {slot: entered[slot] for slot in here}
        full.now[0] += rng.choice([0.0, 0.0001, 0.01])
    assert full.connections.stats.open <= limits.max_connections + limits.reserve


@pytest.mark.parametrize(("reserve", "keys"), [(0, 0), (1, 0), (2, 1), (8, 4), (9, 4)])
def test_slots_are_kept_for_keys_and_probes(reserve: int, keys: int) -> None:
    full = named(max_connections=3, reserve=reserve)
    begun: dict[str, int] = {}
    for turn, sender in enumerate(("client", "probe", "key", "client", "stranger", "key")):
        for number in range(3 + reserve):
            name = f"{sender} {turn} {number}"
            if full.enter(name) is None or not full.begin(name, sender):
                break
            begun[sender] = begun.get(sender, 0) + 1
    assert {name: begun.get(name, 0) for name in ("client", "key")} == {"client": 3, "key": keys}
    assert bool(begun.get("probe")) == bool(begun.get("stranger")) == (reserve > keys)
    assert full.connections.stats.busy == 3 + keys, "nobody waits for probes and strangers"
    assert full.connections.stats.open == 3 + reserve
    # one that is busy may go on, whoever it is
    assert full.begin("client 0 0", "stranger")


@pytest.mark.parametrize("sender", ["probe", "stranger"])
def test_a_request_without_a_key_does_not_make_its_connection_busy(sender: str) -> None:
    """Not even by requests that wait for one another, or answers that nobody reads."""
    full = named(max_connections=2, reserve=2)
    for name in "abcd":
        assert full.enter(name) and full.begin(name, sender)
    assert full.enter("e") and full.dropped == ["a"]
    assert not full.begin("a", sender)
    # behind a probe a client's request is one all the same
    assert full.begin("b", "key") and full.connections.stats.busy == 1
    assert full.enter("f") and full.dropped == ["a", "c"]
    full.connections.rest(full.slots["b"])
    assert full.connections.stats.busy == 0


def test_an_address_has_a_limit_of_its_own() -> None:
    limited = named(max_connections=9, max_per_address=2)
    limited.enter("a", "10.0.0.1")
    assert not limited.connections.crowded("10.0.0.1")
    limited.enter("b", "10.0.0.1")
    assert limited.connections.crowded("10.0.0.1")
    assert not limited.connections.crowded("10.0.0.2")
    assert not limited.connections.crowded(None)
    limited.connections.leave(limited.slots["a"])
    limited.connections.leave(limited.slots["a"])
    assert not limited.connections.crowded("10.0.0.1")
    assert limited.connections.stats.open == 1


@pytest.mark.parametrize(("idle", "given"), [(0, 0), (3, 3), (8, 8), (40, 20), (1000, 64)])
def test_idle_connections_give_their_files(idle: int, given: int) -> None:
    short = named(max_connections=2000)
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
    made = named(max_connections=5, reserve=4)
    for turn in range(5000):
        names = list(made.slots)
        match rng.randrange(5):
            case 0 | 1:
                made.enter(str(turn), rng.choice(["a", "b", "c", None]))
            case 2 if names:
                made.begin(rng.choice(names), rng.choice(["client", "stranger", "key", "probe"]))
            case 3 if names:
                made.connections.rest(made.slots[rng.choice(names)])
            case 4 if names:
                made.connections.leave(made.slots.pop(rng.choice(names)))
        here = [slot for slot in made.slots.values() if not slot.gone]
        stats = made.connections.stats
        assert stats.open == len(here) <= 9
        assert stats.busy == sum(slot.busy for slot in here)
        groups = made.connections._idle.values()
        idle = [slot for each in groups for slot in (*each.fresh, *each.used)]
        assert all(not slot.used for each in groups for slot in each.fresh)
        assert sorted(map(id, idle)) == sorted(id(slot) for slot in here if not slot.busy)
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
