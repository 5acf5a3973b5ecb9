import hypothesis.strategies as st
import pytest
from hypothesis import given
from petal.peer.engine.kv_cache import PAGE
from petal.peer.limits.admission import Admission
from petal.peer.limits.refused import Refused


def test_reservations_are_whole_pages():
    admission = Admission(n_pages=4, max_sessions=10)
    admission.reserve(b"a", PAGE + 1)
    assert admission.free_tokens == 2 * PAGE
    admission.reserve(b"b", 2 * PAGE)
    assert (admission.free_tokens, admission.sessions) == (0, 2)
    admission.release(b"a")
    admission.release(b"a")
    assert (admission.free_tokens, admission.sessions) == (2 * PAGE, 1)


def test_a_refusal_says_what_would_fit():
    admission = Admission(n_pages=4, max_sessions=2, retry_s=1.5)
    with pytest.raises(Refused, match="65 tokens never fit this peer's cache of 64; ask for fewer"):
        admission.reserve(b"a", 4 * PAGE + 1)
    admission.reserve(b"a", 3 * PAGE)
    with pytest.raises(Refused, match=r"17 cache tokens asked, 16 of 64 free; retry in 1.5 s or ask for fewer"):
        admission.reserve(b"b", PAGE + 1)
    admission.reserve(b"b", PAGE)
    with pytest.raises(Refused, match=r"all 2 sessions are taken; retry in 1.5 s"):
        admission.reserve(b"c", 1)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 100)), max_size=40))
def test_never_more_than_there_is(asks):
    admission, held = Admission(n_pages=5, max_sessions=3), {}
    for session, tokens in asks:
        key = bytes([session])
        pages = -(-tokens // PAGE)
        if key in held:
            admission.release(key)
            del held[key]
            continue
        fits = len(held) < 3 and sum(held.values()) + pages <= 5
        try:
            admission.reserve(key, tokens)
            held[key] = pages
            assert fits
        except Refused:
            assert not fits
        assert admission.free_tokens == (5 - sum(held.values())) * PAGE
        assert admission.sessions == len(held)


def test_a_lab_that_was_refused_comes_in_before_others_get_more_than_their_share():
    admission = Admission(n_pages=8, max_sessions=8)
    for session in range(8):
        admission.reserve(bytes([session]), PAGE, "large")
    with pytest.raises(Refused, match="all 8 sessions"):
        admission.reserve(b"s", PAGE, "small", weight=3.0)
    admission.release(bytes([0]))
    with pytest.raises(Refused, match="you hold your fair share and others wait; retry in 2 s"):
        admission.reserve(b"l", PAGE, "large")
    admission.reserve(b"s", PAGE, "small", weight=3.0)
    admission.release(bytes([1]))
    admission.reserve(b"l", PAGE, "large")  # nobody else waits


def test_who_stopped_asking_holds_nobody_up(monkeypatch):
    admission = Admission(n_pages=4, max_sessions=2)
    admission.reserve(b"a", PAGE, "large")
    admission.reserve(b"b", PAGE, "large")
    with pytest.raises(Refused):
        admission.reserve(b"s", PAGE, "small")
    admission.release(b"a")
    with pytest.raises(Refused, match="others wait"):
        admission.reserve(b"a", PAGE, "large")
    monkeypatch.setattr("petal.peer.limits.admission.PATIENCE_S", 0.0)
    admission.reserve(b"a", PAGE, "large")


def test_who_comes_again_is_known_however_many_came_meanwhile():
    admission = Admission(n_pages=4, max_sessions=1)
    for share in ("a", "b", "a", "b", "a"):
        admission.reserve(b"s", PAGE, share)
        with pytest.raises(Refused):
            admission.reserve(b"t", PAGE, "a")
        admission.release(b"s")
    assert set(admission._weights) <= {"a", "b"}


def held(**sessions):
    """A pool of eight pages and as many seats, held by a page a session: sessions of "a" are named a0, a1 …"""
    admission = Admission(n_pages=8, max_sessions=8)
    for share, count in sessions.items():
        for i in range(count):
            admission.reserve(f"{share}{i}".encode(), PAGE, share)
    return admission


def refused(admission, tokens, share, idle_s):
    with pytest.raises(Refused):
        admission.reserve(b"new", tokens, share)
    leaving = admission.giving_way(tokens, share, {name.encode(): seconds for name, seconds in idle_s.items()})
    return [name.decode() for name in leaving]


def test_who_was_idle_for_longest_gives_way_and_nobody_in_vain():
    idle = {"a0": 11.0, "a1": 99.0, "b0": 50.0, "b1": 9.0}
    assert refused(held(a=4, b=4), PAGE, "b", idle) == ["a1"]
    assert refused(held(a=4, b=4), 3 * PAGE, "b", idle) == ["a1", "b0", "a0"]
    assert refused(held(a=4, b=4), 4 * PAGE, "b", idle) == [], "they would not be enough"


def test_who_holds_nothing_comes_in_at_the_cost_of_who_holds_most():
    busy = {"a0": 0.0, "a1": 3.0, "a2": 1.0, "b0": 5.0}
    assert refused(held(a=7, b=1), PAGE, "c", busy) == ["a1"]
    assert refused(held(a=7, b=1), 2 * PAGE, "c", busy) == ["a1", "a2"]
    assert refused(held(a=7, b=1), PAGE, "b", busy) == [], "it has a session"
    assert refused(held(a=7, b=1), 6 * PAGE, "c", {f"a{i}": 0.0 for i in range(7)}) == [], "it keeps its share"


def test_a_stranger_that_holds_everything_does_not_take_back_what_gave_way():
    admission = held(a=8)
    assert refused(admission, PAGE, "b", {"a0": 0.0}) == ["a0"]
    admission.release(b"a0")
    admission.reserve(b"b0", PAGE, "b")
    assert refused(admission, PAGE, "a", {"b0": 0.0, "a1": 0.0}) == []
