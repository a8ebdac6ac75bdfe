"""Where the memory of a penalized step goes when the vocabulary is large.

Trains a tiny GPT-like network for two steps, each time in a process of its own, and prints how much the process grew
over what it had before the first step. A second unit is the size of the logits (tokens x vocabulary, float32). With
"chunked" the head and the cross entropy run over parts of the tokens, each in a checkpoint, so that the logits of one
part are there at a time.

    python benchmarks/vocabulary_memory.py [--vocabularies 1000 10000 50000] [--methods plain taylor]
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import lightning_hessian as lh

METHODS = ("plain", "two_pass", "taylor", "autograd", "gauss_newton")
SENTENCES, LENGTH, WIDTH = 4, 128, 64


class Language(L.LightningModule):
    """Two transformer layers and a head as large as the vocabulary."""

    def __init__(self, vocabulary: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, vocabulary)

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        hidden = self.body(self.embedding(tokens[:, :-1]), mask=mask, is_causal=True).flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        if self.chunks == 1:
            return F.cross_entropy(self.head(hidden), targets)
        parts = zip(hidden.chunk(self.chunks), targets.chunk(self.chunks), strict=True)
        sums = [checkpoint(self.summed_loss, h, y, use_reentrant=False) for h, y in parts]
        return torch.stack(sums).sum() / len(targets)

    def summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.head(hidden), targets, reduction="sum")

    def on_train_start(self) -> None:
        self.before = resident()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def resident() -> int:
    """The memory of this process, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(method: str, vocabulary: int, chunks: int) -> int:
    """How many bytes this process grows by in two steps."""
    torch.manual_seed(0)
    module = Language(vocabulary, chunks)
    data = DataLoader(torch.randint(vocabulary, (2 * SENTENCES, LENGTH + 1)), SENTENCES)
    callbacks = [] if method == "plain" else [lh.HessianRegularizer(lh.HessianTrace(method=method), 1e-6)]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, callbacks=callbacks, **quiet)
    trainer.fit(module, data)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - module.before


def measured(method: str, vocabulary: int, chunks: int) -> int | None:
    """The same in a process of its own; None where it fails."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", method, str(vocabulary), str(chunks)]
    # Freed tensors go back to the system at once. Otherwise a fragmented heap is counted, too.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    if found.returncode:
        print(found.stderr[-600:], file=sys.stderr)
        return None
    return int(found.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[1000, 5000, 20000, 50000])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--chunks", type=int, default=8, help="how many parts the chunked variant has")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        method, vocabulary, chunks = options.one
        print(growth(method, int(vocabulary), int(chunks)))
        return
    print("MB over the memory before the first step (in units of the logits)")
    print("| method | " + " | ".join(f"{v} words" for v in options.vocabularies) + " |")
    print("| --- |" + " --- |" * len(options.vocabularies), flush=True)
    for chunks in (1, options.chunks):
        for method in options.methods:
            cells = []
            for vocabulary in options.vocabularies:
                grown = measured(method, vocabulary, chunks)
                logits = 4 * SENTENCES * LENGTH * vocabulary
                cells.append("fails" if grown is None else f"{grown / 1e6:.0f} ({grown / logits:.1f})")
            name = method if chunks == 1 else f"{method}, chunked"
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
