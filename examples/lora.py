"""LoRA by peft, with the penalty on the adapters only.

A byte-level language model learns the source of one module of Python's standard library. Then it is adapted to another
one by low-rank adapters, while its own weights are frozen. `parameters="*lora_*"` lets the trace run over the adapters.
(Without it, the trace runs over all weights that are trained: the same here, but not with `modules_to_save`.)

    pip install . transformers peft
    python examples/lora.py            # a few minutes on a CPU
    python examples/lora.py --tiny     # seconds
"""

import argparse
import inspect
from importlib import import_module

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_hessian as lh


class LanguageModel(L.LightningModule):
    def __init__(self, net, lr):
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch, batch_idx):
        loss = self.net(input_ids=batch, labels=batch).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.lr)


def source(module, count, length=64):
    """The code of a module as rows of bytes."""
    text = torch.tensor(list(inspect.getsource(import_module(module)).encode()))
    return DataLoader(text[: len(text) // length * length].view(-1, length)[:count], 16, shuffle=True, drop_last=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strength", type=float, default=1e-6)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small network, little text, two steps")
    options = parser.parse_args(arguments)
    L.seed_everything(0)
    width, depth, count = (16, 1, 40) if options.tiny else (128, 4, None)
    net = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth,
            num_attention_heads=4, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    usual = {"logger": False, "enable_checkpointing": False}
    usual |= {"max_epochs": 1, "limit_train_batches": 2} if options.tiny else {"max_epochs": options.epochs}
    L.Trainer(**usual).fit(LanguageModel(net, lr=1e-3), source("argparse", count))

    adapted = get_peft_model(net, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    penalty = lh.HessianTrace(parameters="*lora_*")
    trainer = L.Trainer(**usual, callbacks=[lh.HessianRegularizer(penalty, options.strength)])
    trainer.fit(LanguageModel(adapted, lr=2e-3), source("tarfile", count))
    return trainer


if __name__ == "__main__":
    print({name: round(value.item(), 4) for name, value in main().callback_metrics.items()})
