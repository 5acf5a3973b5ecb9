"""Every fault in a real swarm of a tiny model; the long record is `python -m tests.chaos --trials 300 --model demo`."""

from __future__ import annotations

import pytest

from ..chaos.__main__ import main
from ..chaos.plan import FAULTS, REST, plan


def test_plans_are_functions_of_their_seed_and_cover_every_fault() -> None:
    plans = [plan(seed, 64, 8, 2, 3) for seed in range(40)]
    assert plans == [plan(seed, 64, 8, 2, 3) for seed in range(40)]
    assert {each.fault for each in plans[7:16]} == set(FAULTS)
    assert all(0 <= each.at_token <= 64 - REST for each in plans)
    assert any(each.at_token == 0 for each in plans), "some strike in the prefill"
    assert {place for each in plans for place in each.places} == {0, 1, 2}


@pytest.mark.waits
@pytest.mark.timeout(600)
@pytest.mark.parametrize("hosts", [2, pytest.param(3, marks=pytest.mark.full)])
def test_every_fault_once(hosts: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Two peers of each span: the other one must take over. Of three, one has to be chosen."""
    figures = main(["--trials", str(len(FAULTS)), "--seed", "1000", "--tokens", "32", "--hosts", str(hosts)])
    print(capsys.readouterr().err)
    assert figures["trials"] == figures["identical"] == figures["mid_stream"] == len(FAULTS)
    assert figures["hangs"] == figures["leaks"] == figures["wrong"] == 0
