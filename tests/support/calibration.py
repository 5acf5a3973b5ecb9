"""`python -m tests.support.calibration FILE [ROWS]`: text to quantize SmolLM2 against.

It writes dialogues and documents. tests/data/calibration.txt is a smaller one: the model's answers in tests/data,
and the prose of this project.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from petal.client.distill.device import best_device
from petal.client.distill.dialogues import draw, sample
from petal.client.distill.target import LocalTarget
from petal.client.distill.turns import turns_of
from torch import Tensor

from .reference import demo_checkpoint

_BETWEEN_DOCUMENTS = "<|endoftext|>"
_FRAME = re.compile(r"<\|im_start\|>(user|assistant|system)?\n?|<\|im_end\|>|<\|endoftext\|>")
_LENGTH = 1024
# Documents are drawn at temperatures from the one to the other.
_COOL, _HOT = 0.7, 1.0


def main() -> None:
    path, rows = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 128
    checkpoint = demo_checkpoint()
    tokenizer = checkpoint.tokenizer()
    target = LocalTarget(checkpoint, torch.device(best_device()[0]))
    dialogues = sample(target, turns_of(tokenizer, checkpoint.name), rows - rows // 2, _LENGTH, seed=0).ids
    (between,) = tokenizer.encode(_BETWEEN_DOCUMENTS, add_special=False)
    written = [*dialogues.tolist(), *documents(target, between, rows // 2).tolist()]
    # A reader who takes only the first tokens finds both kinds.
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
    texts = (_FRAME.sub("", tokenizer.decode(written[row], skip_special=False)).strip() for row in order)
    path.write_text("\n\n".join(texts) + "\n", "utf-8")


@torch.no_grad()
def documents(target: LocalTarget, between: int, rows: int) -> Tensor:
    """Token ids [rows, _LENGTH] that the model writes behind the token between documents; the same each time."""
    torch.manual_seed(0)
    ids = torch.full((rows, _LENGTH), between, device=target.device)
    heat = torch.linspace(_COOL, _HOT, rows, device=target.device)
    with target.lockstep(_LENGTH) as cache:
        for at in range(1, _LENGTH):
            ids[:, at] = draw(target.step(ids[:, at - 1], cache), heat)
    return ids.cpu()


if __name__ == "__main__":
    main()
