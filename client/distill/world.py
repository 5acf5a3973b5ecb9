"""The processes that train together, one for each GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException, spawn

from .shape import DistillError


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """True for the process that reports and writes."""
        return self.rank == 0

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their mean over all processes."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        pieces = (flat / self.size).split([tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))

    @torch.no_grad()
    def share(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the leader's tensors."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, 0)

    def agree(self, value: float) -> float:
        """The leader's value, in every process."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return float(shared)

    def wait(self) -> None:
        """Until every process is here."""
        self.agree(0.0)


def together(work: Callable[..., Any], size: int, device: str, *arguments: Any) -> None:
    """Run `work(world, *arguments)` in `size` processes; a single one is this. Raises DistillError where one fails."""
    if size == 1:
        work(World(0, 1, torch.device(device)), *arguments)
        return
    # A free port of this machine, chosen before the processes start.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    try:
        spawn(_enter, (work, size, device, store.port, arguments), nprocs=size)
    except ProcessRaisedException as error:
        raise DistillError(str(error).strip().splitlines()[-1]) from error


def _enter(rank: int, work: Callable[..., Any], size: int, kind: str, port: int, arguments: tuple[Any, ...]) -> None:
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // size))
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    try:
        work(World(rank, size, device), *arguments)
    finally:
        dist.destroy_process_group()
