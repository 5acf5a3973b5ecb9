"""Fitting a joining peer to its swarm and its machine: blocks, weights and cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..kernels.backend import Backend, LayerSpec
from ..kernels.cpu.isa import VARIABLE
from ..protocol import petal_pb2 as pb
from ..protocol.checkpoint.checkpoint import Checkpoint
from ..protocol.checkpoint.layout import CheckpointError
from .model import Span, load_span
from .model.precision import (
    NONE,
    TORCH_DTYPES,
    WeightPrecision,
    choose_precision,
    dense_name,
    fitting_blocks,
    precision_of,
    span_bytes,
)
from .options import DEFAULT_CACHE_TOKENS, ServeOptions
from .placement import Profile, choose_span, fill_gaps, of_profile, served_numerics, served_profiles

# Of the memory that is left beside the weights, what the cache may take; activations and the replay log have the rest.
_CACHE_SHARE = 0.6
# With less no conversation is possible.
_LEAST_TOKENS = 512


class ServeError(RuntimeError):
    """Why a peer cannot start, in one sentence that says what to do."""


@dataclass(frozen=True)
class Joiner:
    """What was asked for, of which model, where. `free`: bytes that weights may take; `note` tells the owner."""

    options: ServeOptions
    checkpoint: Checkpoint
    backend: Backend
    free: int
    note: Callable[[str], None]

    def precision(self, records: Sequence[pb.PeerRecord]) -> WeightPrecision:
        """Weights as asked for; else as the swarm serves them, since no route mixes them; else as stored or as fits.

        Raises CheckpointError.
        """
        options, served = self.options, served_profiles(records, self.checkpoint.n_blocks)
        if options.quant is None and options.dtype is None:
            for profile in served:
                if fitting := self._in(profile):
                    return fitting
        chosen = self._own()
        if served and Profile(chosen.dtype_name, chosen.quant) not in served:
            self.note(
                f"the swarm serves {self.checkpoint.name} in {served[0]}, this peer in "
                f"{Profile(chosen.dtype_name, chosen.quant)}, and no route mixes them unless told to; "
                + (
                    "leave --quant and --dtype out"
                    if options.quant or options.dtype
                    else "use a checkpoint like theirs"
                )
            )
        return chosen

    def _in(self, profile: Profile) -> WeightPrecision | None:
        if TORCH_DTYPES.get(profile.dtype) not in self.backend.dense_dtypes:
            return None
        try:
            return precision_of(self.checkpoint, profile.quantization or "none", profile.dtype)
        except CheckpointError:  # this checkpoint stores other weights
            return None

    def _own(self) -> WeightPrecision:
        options, kinds = self.options, self.backend.dense_dtypes
        if options.dtype is not None and TORCH_DTYPES[options.dtype] not in kinds:
            raise ServeError(
                f"the device {self.backend.device} computes in {dense_name(self.backend)}, not in {options.dtype}; "
                "leave --dtype out, or give --device cpu"
            )
        if options.quant is not None:
            dtype = dense_name(self.backend) if options.quant == NONE else None
            return precision_of(self.checkpoint, options.quant, options.dtype or dtype)
        wanted = len(options.blocks) if options.blocks else options.num_blocks
        return choose_precision(self.checkpoint, options.dtype, wanted, self.free, self.backend)

    def in_step(self, precision: WeightPrecision, records: Sequence[pb.PeerRecord]) -> Joiner:
        """In exact mode: with the swarm's own arithmetic where this machine has it, since no exact route mixes them."""
        profile = Profile(precision.dtype_name, precision.quant)
        served = served_numerics(records, self.checkpoint.n_blocks, profile) if self.options.exact else []
        for numerics in served:
            wanted = numerics.rpartition("/")[2]
            backend = self.backend.in_arithmetic(wanted, precision.product_dtype)
            if backend is not None and precision.numerics(backend) == numerics:
                if backend is not self.backend:
                    self.note(f"computing as the swarm's peers in exact mode do, in {numerics}")
                return replace(self, backend=backend)
        if served:
            self.note(
                f"the swarm's peers in exact mode compute in {served[0]}, this one in "
                f"{precision.numerics(self.backend)}, which no exact route mixes; this machine cannot do as they do"
                + (f" while {VARIABLE} is set" if os.environ.get(VARIABLE) else "")
            )
        return self

    def blocks(self, precision: WeightPrecision, records: Sequence[pb.PeerRecord]) -> range:
        """The span as asked for, or what is missing first. Raises ServeError."""
        options, n_blocks, name = self.options, self.checkpoint.n_blocks, self.checkpoint.name
        if options.blocks is not None:
            if options.blocks.stop > n_blocks:
                asked = f"{options.blocks.start}:{options.blocks.stop}"
                raise ServeError(f"--blocks {asked} is no part of {name}, which has blocks 0:{n_blocks}")
            return options.blocks
        if (options.num_blocks or 0) > n_blocks:
            raise ServeError(f"--num-blocks {options.num_blocks} is more than the {n_blocks} blocks of {name}")
        alike = of_profile(records, Profile(precision.dtype_name, precision.quant))
        if options.num_blocks is not None:
            return choose_span(alike, n_blocks, options.num_blocks)
        most = fitting_blocks(self.checkpoint, precision, self.free, self.backend)
        if most < 1:
            raise ServeError(f"not one block fits the free memory: {self.what_fits(precision)}, or try a smaller model")
        span, reason = fill_gaps(alike, n_blocks, most)
        limit = f"; no more than {most} of {n_blocks} fit the memory" if most < n_blocks else ""
        if alike or limit:
            self.note(f"taking blocks {span.start}:{span.stop} of {name}: {reason}{limit}")
        return span

    def load(self, precision: WeightPrecision, blocks: range, loading: Callable[[int, int], None]) -> Span:
        """Load a span; `loading` hears of stored bytes read, of all. Raises ServeError.

        What cannot fit is refused early: the system would end the process in the midst of it.
        """
        if span_bytes(self.checkpoint, precision, blocks, self.backend) > self.free / self.backend.weights_share:
            fits = self.what_fits(precision)
            raise ServeError(f"blocks {blocks.start}:{blocks.stop} do not fit the memory: {fits}")
        parts = self.checkpoint.span_tensors(blocks.start, blocks.stop)
        total = sum(self.checkpoint.info(name).nbytes for names in parts.values() for name in names)
        done = 0

        def progress(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            loading(done, total)

        try:
            return load_span(self.checkpoint, blocks.start, blocks.stop, progress, precision, self.backend)
        except MemoryError as error:
            raise ServeError(f"the memory ran out while loading: {self.what_fits(precision)}") from error

    def what_fits(self, precision: WeightPrecision) -> str:
        """How many blocks would fit, and in which weights."""
        ways = [precision, *(precision_of(self.checkpoint, quant) for quant in ("int8", "int4"))]
        counts = {way.quant: fitting_blocks(self.checkpoint, way, self.free, self.backend) for way in ways}
        fits = ", ".join(f"{count} with --quant {quant}" for quant, count in counts.items())
        return f"of {self.checkpoint.n_blocks} blocks fit {fits}; ask for fewer with --num-blocks"


def cache_tokens(
    asked: int | None, layers: Sequence[LayerSpec], dtype: torch.dtype, free: int, note: Callable[[str], None]
) -> int:
    """Tokens of a cache of `dtype`: as asked for, if they fit `free` bytes; else as many as do. Raises ServeError."""
    token = sum(spec.kv_heads * (spec.key_width + spec.value_width) for spec in layers) * dtype.itemsize
    most = int(free * _CACHE_SHARE // max(1, token))
    wanted = asked or DEFAULT_CACHE_TOKENS
    if wanted <= most:
        return wanted
    if asked is not None:
        raise ServeError(
            f"--cache-tokens {asked} needs {asked * token / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are "
            f"free beside the weights; ask for at most {most}, or for fewer blocks"
        )
    if most < _LEAST_TOKENS:
        raise ServeError(f"beside the weights only {most} tokens of cache fit the memory; ask for fewer blocks")
    note(f"the cache holds {most} tokens, not {wanted}: more do not fit the memory; fewer blocks leave more")
    return most
