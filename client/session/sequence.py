"""What a session's peers hold of its sequence, and what the next step must tell them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ...protocol import petal_pb2 as pb
from ...protocol.wire.sampling import SamplingParams
from ...protocol.wire.tree import DraftTree, chain
from .result import OutputOptions, StepResult


@dataclass
class SequenceState:
    """`ids` are cached once the next step has told the peers: it commits rows of the step before, then rewinds."""

    ids: list[int] = field(default_factory=list)
    prompt_length: int = 0
    step: int = 0
    commit: list[int] = field(default_factory=list)
    rewind: int | None = None
    sampling: SamplingParams | None = None
    # Length of the sequence that the cached rows were computed for, see Opened.rope_borders.
    extent: int = 0
    # The step that tells the last stage the history anew.
    retelling: int = 0

    def fork(self) -> SequenceState:
        """The same, for another session."""
        return replace(self, ids=list(self.ids), commit=list(self.commit))

    def rewind_to(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= len(self.ids):
            raise ValueError(f"cannot rewind to {length}: the session holds {len(self.ids)} tokens")
        if length < len(self.ids):
            self.rewind = length if self.rewind is None else min(length, self.rewind)
            self.prompt_length = min(self.prompt_length, length)
            del self.ids[length:]

    def extend(self, length: int, borders: Iterable[int]) -> bool:
        """Be part of a sequence of `length`; whether the rows that are cached are good for it."""
        before, self.extent = self.extent, length
        return not self.ids or all((length > border) == (before > border) for border in borders)

    def take(self, tree: DraftTree, result: StepResult) -> None:
        """Go on from what was accepted of a tree."""
        self.commit, result.tree = result.accepted, tree
        self.ids.extend([tree.ids[row] for row in result.accepted])

    def resumed(self) -> None:
        """The peers hold `ids`, and nothing is left to tell."""
        self.commit, self.rewind = [], None

    def next_step(
        self,
        ids: Sequence[int],
        parents: Sequence[int],
        output: OutputOptions,
        *,
        prefill: bool,
        sample: bool,
        sampling: SamplingParams | None,
        client_draws: bool,
        extent: int = 0,
    ) -> pb.Step:
        """The message of the step that appends these rows. `sample`: the row behind them is drawn, here or there."""
        self.step += 1
        step = pb.Step(
            step=self.step,
            base=len(self.ids),
            commit=self.commit,
            rewind=self.rewind,
            ids=ids,
            parents=parents,
            prefill=prefill,
            sample=sample and not client_draws,
            want=pb.Want(
                top_logprobs=0 if client_draws else output.top_logprobs,
                logits=output.logits and not (sample and client_draws),
                hidden=output.hidden or (sample and client_draws),
            ),
            trace=output.trace,
            extent=extent,
        )
        if sampling is not None and sampling != self.sampling:
            step.sampling.CopyFrom(sampling_message(sampling))
            self.sampling = sampling
        self.commit, self.rewind = [], None
        return step

    def to_first_stage(self, step: pb.Step) -> pb.ClientFrame:
        """Without what only the last stage needs."""
        frame = pb.ClientFrame(step=step)
        frame.step.ClearField("sampling")
        return frame

    def to_last_stage(self, step: pb.Step, up_to_date: bool) -> pb.ClientFrame:
        """With all that the last stage needs to draw; a new one lacks the history and how to sample."""
        frame = pb.ClientFrame(step=step)
        if not up_to_date or step.step == self.retelling:
            length = min(self.prompt_length, step.base)
            frame.step.history.CopyFrom(pb.History(ids=self.ids[: step.base], prompt_length=length))
            if self.sampling:
                frame.step.sampling.CopyFrom(sampling_message(self.sampling))
        return frame

    def to_silent_last_stage(self, step: pb.Step) -> pb.ClientFrame:
        """Where this client draws: the shape of the tree, and no ids."""
        frame = self.to_first_stage(step)
        frame.step.ClearField("ids")
        frame.step.parents[:] = step.parents or chain(len(step.ids)).parents
        return frame


def sampling_message(params: SamplingParams) -> pb.Sampling:
    return pb.Sampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
        sequence=params.sequence,
        logit_bias=dict(params.logit_bias),
    )
