"""`python -m tests.calibration FILE [ROWS]`: text to quantize SmolLM2 against, dialogues that it writes itself.

tests/data/calibration.txt is a smaller one: the model's answers in tests/data, and the prose of this project.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from petal.client.distill.device import best_device
from petal.client.distill.dialogues import sample
from petal.client.distill.target import LocalTarget
from petal.client.distill.turns import turns_of

from .reference import demo_checkpoint

_FRAME = re.compile(r"<\|im_start\|>(user|assistant|system)?\n?|<\|im_end\|>")
_LENGTH = 1024


def main() -> None:
    path, rows = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 128
    checkpoint = demo_checkpoint()
    tokenizer = checkpoint.tokenizer()
    target = LocalTarget(checkpoint, torch.device(best_device()[0]))
    written = sample(target, turns_of(tokenizer, checkpoint.name), rows, _LENGTH, seed=0)
    texts = (_FRAME.sub("", tokenizer.decode(ids, skip_special=False)).strip() for ids in written.ids.tolist())
    path.write_text("\n\n".join(texts) + "\n", "utf-8")


if __name__ == "__main__":
    main()
