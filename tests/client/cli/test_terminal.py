"""What a person sees of a failover, and what is printed where a generation breaks off."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from petal.client.cli import terminal
from petal.client.output import OutputChunk
from petal.client.routing.route import NoRoute
from petal.client.session.failover import Failover

EVENT = Failover("peer AAAA [0:5]: Socket closed", ("BBBB [0:3]", "CCCC [3:5]"), 0.4142)
SENTENCE = "peer AAAA [0:5]: Socket closed; BBBB [0:3] and CCCC [3:5] took over after 0.41 s"


def pieces(breaks: bool = False) -> Iterator[OutputChunk]:
    yield OutputChunk([1], "Once ")
    yield OutputChunk([2], "upon", events=[EVENT])
    if breaks:
        raise NoRoute("nobody who can be reached hosts blocks 0-4 any more; waited 30 s for another")
    yield OutputChunk([3], ".", finish_reason="stop")


def test_an_event_names_the_fault_the_replacements_and_the_pause() -> None:
    assert str(EVENT) == SENTENCE
    assert (
        str(Failover("peer AAAA [0:5]: reset", (), 1.0)) == "peer AAAA [0:5]: reset; the same peers go on after 1.00 s"
    )


@pytest.mark.parametrize("verbose", [True, False])
def test_only_the_verbose_hear_of_it(capsys: pytest.CaptureFixture[str], verbose: bool) -> None:
    terminal.show(pieces(), verbose)
    printed = capsys.readouterr()
    assert printed.out == "Once upon.\n"
    assert (SENTENCE in printed.err.replace("\n", "")) == verbose


def test_the_text_so_far_and_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NoRoute):
        terminal.print_json(pieces(breaks=True))
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["ids"], answer["finish_reason"]) == ("Once upon", [1, 2], None)
    assert answer["error"].startswith("nobody who can be reached hosts blocks 0-4")
    assert answer["events"] == [SENTENCE]
    with pytest.raises(NoRoute):
        terminal.show(pieces(breaks=True))
    assert capsys.readouterr().out == "Once upon\n"
