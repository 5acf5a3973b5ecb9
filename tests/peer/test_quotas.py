import json

import pytest
from petal.peer.limits.quotas import Quota, Quotas, QuotaUsage, QuotaUsages
from petal.peer.limits.refused import Refused
from petal.protocol.trust.trust import Principal

OXFORD = Principal("a" * 52, "client", (("lab", "oxford"),))
STRANGER = Principal("b" * 52)


def usage(**limits: int) -> QuotaUsage:
    return QuotaUsage(OXFORD, Quota(**limits), 1.0)


def test_the_first_rule_that_fits_counts(tmp_path):
    rules = [
        {"label": "lab=oxford", "role": "client", "sessions": 4},
        {"role": "peer", "sessions": 9, "priority": 3},
        {"sessions": 1, "tree_nodes": 8},
    ]
    path = tmp_path / "quotas.json"
    path.write_text(json.dumps({"quotas": rules, "weights": {"oxford": 2}}))
    quotas = Quotas.read(path)
    assert quotas.of(OXFORD) == Quota(sessions=4)
    assert quotas.of(Principal("c" * 52, "peer")) == Quota(sessions=9, priority=3)
    assert quotas.of(STRANGER) == Quota(sessions=1, tree_nodes=8)
    assert (quotas.weight(OXFORD.share), quotas.weight(STRANGER.share)) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("[]", "no quotas"),
        ("{", "no quotas"),
        ('{"quotas": [{"sesions": 1}]}', "no limit 'sesions'"),
        ('{"quotas": [{"sessions": -1}]}', "whole numbers"),
        ('{"weights": {"a": 0}}', "weights above 0"),
        ('{"limits": 1}', "not limits"),
    ],
)
def test_a_bad_file_is_refused_in_a_sentence(tmp_path, said, why):
    path = tmp_path / "quotas.json"
    path.write_text(said)
    with pytest.raises(ValueError, match=why):
        Quotas.read(path)


def test_sessions_and_cache():
    mine = usage(sessions=2, cache_tokens=100)
    mine.open(b"1", 60)
    with pytest.raises(Refused, match="100 cache tokens, 60 are held"):
        mine.open(b"2", 60)
    mine.open(b"2", 40)
    with pytest.raises(Refused, match="2 sessions"):
        mine.open(b"3", 0)
    mine.close(b"1")
    mine.open(b"3", 60)
    with pytest.raises(Refused) as caught:
        usage(cache_tokens=10).open(b"1", 11)
    assert caught.value.final


def test_tokens_a_minute(monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    mine = usage(tokens_per_minute=60)
    mine.spend(60)
    with pytest.raises(Refused, match="60 tokens a minute; retry in 10 s"):
        mine.spend(10)
    now += 10
    mine.spend(10)
    now += 3600
    mine.spend(60)
    with pytest.raises(Refused):
        mine.spend(1)


def test_who_comes_again_finds_what_it_had_used():
    usages = QuotaUsages(Quotas())
    assert usages.of(OXFORD) is usages.of(OXFORD)


def test_clients_that_are_gone_do_not_pile_up(monkeypatch):
    monkeypatch.setattr("petal.peer.limits.quotas._KNOWN", 10)
    usages = QuotaUsages(Quotas())
    usages.of(OXFORD).open(b"1", 1)
    for number in range(50):
        usages.of(Principal(str(number)))
    assert len(usages._of) <= 11
    assert not usages.of(OXFORD).idle
