"""What the client and the stage before send of a step, checked on its own; the state checks it against the session."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable

from ...protocol import petal_pb2 as pb
from ...protocol.wire.sampling import SamplingError, SamplingParams
from ...protocol.wire.step import StepError, header_of
from ...protocol.wire.verification import TokenHistory
from ..engine.step import Step
from .spec import SessionSpec, invalid


def client_step(message: pb.Step, spec: SessionSpec) -> Step:
    """What a client sends: ids for the first and the last stage, sampling for the last. Raises SessionFailed.

    A client that holds the LM head sends embeddings to the first stage, and to the last nothing but the header.
    """
    ids = tuple(message.ids)
    try:
        if message.op != pb.FORWARD:
            raise StepError("this peer runs forward steps only")
        header = header_of(message, _count(message, spec), ids)
        worst = max(ids, default=0)
        if worst >= spec.vocab_size:
            raise StepError(f"token id {worst} is past the vocabulary of {spec.vocab_size}")
        sampling = _sampling(message.sampling, spec) if message.HasField("sampling") else None
        history = _history(message, spec) if message.HasField("history") else None
    except (StepError, SamplingError) as error:
        raise invalid(str(error)) from error
    embeddings = bytearray(message.embeddings)
    brought = hashlib.sha256(embeddings).digest() if embeddings else ids
    return Step(header, ids, embeddings, brought, sampling, history)


def link_step(message: pb.Activations, spec: SessionSpec) -> Step:
    """What the stage before sends: the first part of its activations. Raises SessionFailed."""
    try:
        header = header_of(message, message.rows)
    except StepError as error:
        raise invalid(str(error)) from error
    expected = header.rows * spec.row_bytes
    if message.total_bytes != expected:
        raise invalid(
            f"{header.rows} rows are {expected} bytes in this session's codec, {message.total_bytes} were announced"
        )
    return Step(header, hidden=bytearray(message.hidden), hops=list(message.hops))


class PartialSteps:
    """Steps of which some stream has not brought its part yet."""

    def __init__(self, spec: SessionSpec) -> None:
        self._spec = spec
        self._from_client: dict[int, Step] = {}
        self._from_link: dict[int, Step] = {}

    def add_client(self, step: Step, newest: int) -> None:
        """The client's part of a step. Raises SessionFailed."""
        _check_order(step.header.step, newest, self._from_client)
        self._from_client[step.header.step] = step

    def add_link(self, message: pb.Activations, newest: int) -> Step | None:
        """One part of what the stage before sends; the step once that is whole. Raises SessionFailed.

        Replayed rows are kept nowhere: they come in frames of whole rows.
        """
        step = self._from_link.get(message.step)
        if step:
            step.hidden += message.hidden
        else:
            step = link_step(message, self._spec)
        expected = step.header.rows * self._spec.row_bytes
        if len(step.hidden) > expected:
            raise invalid(f"step {message.step} brings {len(step.hidden)} bytes, {expected} were announced")
        whole = len(step.hidden) == expected
        if step.header.replay:
            if not whole:
                raise invalid("replayed rows come in frames of whole rows")
            return step
        _check_order(message.step, newest, self._from_link)
        self._from_link[message.step] = step
        return step if whole else None

    def take(self, number: int, newest: int) -> Step | None:
        """The step, if every stream that carries a part of it has brought it. Raises SessionFailed.

        Of a repeat one part suffices: the client's drives it at the first and the last stage, the link's elsewhere.
        """
        spec, repeated = self._spec, number <= newest
        client, link = self._from_client.get(number), self._from_link.get(number)
        if not repeated and not self._is_whole(client, link):
            return None
        self._from_client.pop(number, None)
        self._from_link.pop(number, None)
        if repeated:
            return client if spec.is_first or spec.is_last else link
        if client and link:
            if client.header.content != link.header.content:
                raise invalid(f"step {number} differs between the client's stream and the link")
            client.hidden, client.hops = link.hidden, link.hops
            client.received_ns = max(client.received_ns, link.received_ns)
        step = client or link
        assert step
        if step.header.deadline_ms:
            step.deadline = time.monotonic() + step.header.deadline_ms / 1000
        return step

    def forget_link(self) -> None:
        """Parts of an old route never become whole; the new one sends those steps again."""
        self._from_link.clear()

    def forget(self) -> None:
        self._from_client.clear()
        self._from_link.clear()

    def _is_whole(self, client: Step | None, link: Step | None) -> bool:
        spec = self._spec
        if not client and (spec.is_first or spec.is_last):
            return False
        return spec.is_first or (link is not None and len(link.hidden) == link.header.rows * spec.row_bytes)


def _check_order(number: int, newest: int, waiting: Iterable[int]) -> None:
    """On one stream no step is left out, else what never becomes whole would pile up."""
    expected = max(newest, *waiting, 0) + 1
    if number > expected:
        raise invalid(f"step {number} is ahead; step {expected} comes next")


def _count(message: pb.Step, spec: SessionSpec) -> int:
    """Rows of a step. Raises StepError."""
    if message.ids and message.embeddings:
        raise StepError("a step carries token ids or embeddings, not both")
    if message.embeddings and not spec.is_first:
        raise StepError("embeddings go to the first stage alone")
    if message.sample and spec.is_last and not message.ids:
        raise StepError("the last stage samples where it gets token ids; without them ask for hidden states")
    rows, rest = divmod(len(message.embeddings), spec.row_bytes)
    if rest:
        raise StepError(
            f"{len(message.embeddings)} bytes of embeddings are no rows of {spec.row_bytes} in this session's codec"
        )
    # Who gets neither learns the number of rows from their parents.
    return rows or len(message.ids) or (0 if spec.is_first else len(message.parents))


def _sampling(message: pb.Sampling, spec: SessionSpec) -> SamplingParams:
    """Raises SamplingError for a value out of range, and by name for a field that this version does not serve."""
    if message.grammar_mask:
        raise SamplingError("this peer does not serve grammar_mask; a grammar comes with the open frame")
    if (worst := max(message.logit_bias, default=0)) >= spec.vocab_size:
        raise SamplingError(f"logit_bias names token {worst}, past the vocabulary of {spec.vocab_size}")
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        seed=message.seed,
        sequence=message.sequence,
        logit_bias=tuple(sorted(message.logit_bias.items())),
    )


def _history(message: pb.Step, spec: SessionSpec) -> TokenHistory:
    history = message.history
    if len(history.ids) != message.base or history.prompt_length > len(history.ids):
        raise StepError(f"a history of {len(history.ids)} ids does not fit {message.base} cached rows")
    if history.ids and max(history.ids) >= spec.vocab_size:
        raise StepError(f"the history holds an id past the vocabulary of {spec.vocab_size}")
    return TokenHistory(list(history.ids), history.prompt_length)
