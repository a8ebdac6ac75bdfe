"""A model of Hugging Face in a LightningModule, whose batches are dictionaries.

A byte-level BERT tells from which module of Python's standard library a line of code is. The batches are what a
tokenizer gives (`input_ids`, `attention_mask`, `labels`), and the model computes the loss. The penalty is the trace of
the Gauss-Newton matrix, with a strength that keeps its gradient at a tenth of the loss's.

    pip install . transformers
    python examples/text_classifier.py            # a few minutes on a CPU
    python examples/text_classifier.py --tiny     # seconds
"""

import argparse
import inspect
import random
from importlib import import_module

import lightning as L
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import lightning_hessian as lh

MODULES = ("argparse", "_pydecimal", "email.message", "tarfile")


class TextClassifier(L.LightningModule):
    def __init__(self, config):
        super().__init__()
        self.net = BertForSequenceClassification(config)

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss

    def validation_step(self, batch, batch_idx):
        found = self.net(**batch).logits.argmax(1) == batch["labels"]
        self.log("val/accuracy", found.float().mean(), batch_size=len(found))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-4)


def lines(longest=64):
    """(bytes of a line of code, number of its module)."""
    sources = [inspect.getsource(import_module(name)) for name in MODULES]
    texts = [(line.strip(), label) for label, text in enumerate(sources) for line in text.splitlines()]
    found = [(torch.tensor(list(text.encode()[:longest])), label) for text, label in texts if len(text) > 20]
    random.Random(0).shuffle(found)
    return found


def collate(samples):
    texts, labels = zip(*samples, strict=True)
    ids = pad_sequence(texts, batch_first=True)  # 0 is the padding: no line has that byte
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor(labels)}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small network, few lines, two steps")
    options = parser.parse_args(arguments)
    L.seed_everything(0)
    width, depth = (16, 1) if options.tiny else (96, 3)
    config = BertConfig(
        vocab_size=256, hidden_size=width, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=2 * width,
        max_position_embeddings=64, num_labels=len(MODULES),
    )  # fmt: skip
    data = lines()[: 200 if options.tiny else None]
    cut = len(data) * 9 // 10
    train = DataLoader(data[:cut], 32, shuffle=True, drop_last=True, collate_fn=collate)
    regularizer = lh.HessianRegularizer(lh.HessianTrace(method="gauss_newton"), lh.GradientShare(0.1), warmup_steps=50)
    length = {"max_epochs": 1, "limit_train_batches": 2} if options.tiny else {"max_epochs": options.epochs}
    trainer = L.Trainer(**length, callbacks=[regularizer], logger=False, enable_checkpointing=False)
    trainer.fit(TextClassifier(config), train, DataLoader(data[cut:], 128, collate_fn=collate))
    return trainer


if __name__ == "__main__":
    print({name: round(value.item(), 4) for name, value in main().callback_metrics.items()})
