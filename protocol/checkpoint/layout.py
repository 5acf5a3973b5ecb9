"""Which tensors of a model belong to which block, and which are shared: decided by name alone, for every family."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import PetalError

_BLOCK = re.compile(r"^(?P<stack>(?:.*?\.)?)(?P<block>\d{1,5})\.")
# Stacks that are no language model's, where several have as many blocks.
_SENSES = re.compile(r"vision|visual|image|audio|speech|encoder\.layers")
_NORMS = {"norm", "ln_f", "norm_f", "final_norm", "final_layer_norm", "final_layernorm"}
_HEADS = {"lm_head", "embed_out", "output", "output_layer", "head", "lm_loss", "decoder"}
_TOKEN_MATRICES = {
    "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "tokens_embed", "embeddings", "embedding",
    "word_embedding", "input_embedding", "embed", "w",
}  # fmt: skip


class CheckpointError(PetalError, ValueError):
    """A model cannot be used; the message is one sentence that says what is wrong and what would be right."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as stored: Hugging Face name, shape [rows, ..., columns], stored type and stored size in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """Tensor names by place, each list sorted. A tied `head` lists the token matrix of `embedding`.

    What is stored decides: a head beside the token matrix is the model's, even where the config calls them tied.
    """

    blocks: tuple[tuple[str, ...], ...]
    embedding: tuple[str, ...]
    norm: tuple[str, ...]
    head: tuple[str, ...]
    token_matrix: str
    tied: bool

    def part(self, part: str) -> tuple[str, ...]:
        """Names of a digest part: a block number in decimal, "embedding", "norm" or "head"."""
        shared = {"embedding": self.embedding, "norm": self.norm, "head": self.head}
        return shared[part] if part in shared else self.blocks[int(part)]


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config: multimodal models nest it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def count_blocks(config: Mapping[str, Any], model: str) -> int:
    """Number of blocks that `config` promises; raises CheckpointError where it promises none."""
    text = text_config(config)
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_decoder_layers"):
        value = text.get(key)
        if isinstance(value, int) and 0 < value < 100_000:
            return value
    raise CheckpointError(f"{model}: the config does not say how many blocks there are: set num_hidden_layers.")


def arrange(names: Iterable[str], config: Mapping[str, Any], model: str) -> Layout:
    """Sort tensor `names` into blocks, embedding, norm and head.

    Raises CheckpointError if the blocks differ from the config's count, or a shared tensor is missing.
    """
    names = sorted(names)
    blocks, outside = _split_blocks(names, count_blocks(config, model), _extra_blocks(config), model)
    norm = tuple(name for name in outside if _module(name) in _NORMS)
    stored_head = tuple(name for name in outside if _module(name) in _HEADS)
    embedding = tuple(name for name in outside if name not in norm and name not in stored_head)
    matrix = next((name for name in embedding if _module(name) in _TOKEN_MATRICES), None)
    if matrix is None:
        wanted = ", ".join(sorted(_TOKEN_MATRICES))
        raise CheckpointError(f"{model}: no token embedding found: one of {wanted} is needed.")
    tie = text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings"))
    tied = all(name.endswith(".bias") for name in stored_head)
    if tie is False and tied:
        raise CheckpointError(f"{model}: lm_head.weight is missing although the config has tie_word_embeddings false.")
    head = tuple(sorted((matrix, *stored_head))) if tied else stored_head
    return Layout(blocks, embedding, norm, head, matrix, tied)


def _extra_blocks(config: Mapping[str, Any]) -> int:
    """Blocks behind the last that predict further tokens in training: no part of the model that is served."""
    extra = text_config(config).get("num_nextn_predict_layers")
    return extra if isinstance(extra, int) else 0


def _split_blocks(
    names: list[str], n_blocks: int, extra: int, model: str
) -> tuple[tuple[tuple[str, ...], ...], list[str]]:
    """Find the one stack of `n_blocks` blocks; a vision tower's stack has another length and stays outside."""
    stacks: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        if match := _BLOCK.match(name):
            stacks[match["stack"]][int(match["block"])].append(name)
    lengths = range(n_blocks, n_blocks + extra + 1)
    fitting = [
        stack
        for stack, blocks in stacks.items()
        if len(blocks) in lengths and sorted(blocks) == list(range(len(blocks)))
    ]
    if len(fitting) > 1:
        fitting = [stack for stack in fitting if not _SENSES.search(stack)]
    if len(fitting) != 1:
        found = ", ".join(f"{len(blocks)} in {stack}*" for stack, blocks in stacks.items()) or "none"
        raise CheckpointError(f"{model}: the config asks for one stack of {n_blocks} blocks, the tensors hold {found}.")
    blocks = stacks[fitting[0]]
    outside = [name for name in names if (match := _BLOCK.match(name)) is None or match["stack"] != fitting[0]]
    return tuple(tuple(blocks[block]) for block in range(n_blocks)), outside


def _module(name: str) -> str:
    """The module that owns a tensor: "model.norm.weight" -> "norm"."""
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else parts[0]
