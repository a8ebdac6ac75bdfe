"""Two ranks: processes on this machine that deal the samples out between them, and what they bring home."""

import os

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from nets import CPU, weights
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.utils.data import DataLoader

STEPS = 3


class DealtInTurn(torch.utils.data.Sampler):
    """Every second sample for each of two ranks, unshuffled (Lightning's own sampler shuffles)."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(range(dist.get_rank(), self.samples, 2))

    def __len__(self):
        return self.samples // 2


def dealt(loader):
    """The loader of each rank."""
    return DataLoader(loader.dataset, loader.batch_size, sampler=DealtInTurn(len(loader.dataset)))


def joined(loader, batches=STEPS):
    """The batches of both ranks, rank 0 first."""
    x, y = loader.dataset.tensors
    size = loader.batch_size
    for step in range(batches):
        parts = [slice(2 * size * step + rank, 2 * size * (step + 1), 2) for rank in range(2)]
        yield torch.cat([x[p] for p in parts]), torch.cat([y[p] for p in parts])


def two_ranks(**strategy):
    """Settings of a Trainer that forks two processes."""
    return {"devices": 2, "strategy": DDPStrategy(start_method="fork", process_group_backend="gloo", **strategy)}


def hand_over(what, trainer, path):
    """To be called on each rank."""
    torch.save(what, path / f"{trainer.global_rank}.pt")


def handed_over(path):
    """What the two ranks have handed over."""
    return [torch.load(path / f"{rank}.pt") for rank in range(2)]


class Result(L.Callback):
    """Hands the weights and the logs over."""

    def __init__(self, path):
        self.path = path
        self.logged = []

    def on_train_batch_end(self, trainer, *_):
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})

    def on_train_end(self, trainer, pl_module):
        hand_over({"weights": self.weights(pl_module), "logged": self.logged}, trainer, self.path)

    def weights(self, module):
        return weights(module)


def fit_two(path, module, regularizer, loader, **strategy):
    """The results of both ranks."""
    trainer = L.Trainer(
        **CPU,
        **two_ranks(**strategy),
        max_steps=STEPS,
        callbacks=[regularizer, Result(path)],
        use_distributed_sampler=False,
    )
    trainer.fit(module, dealt(loader))
    return handed_over(path)


needs_fsdp2 = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this version of PyTorch has no FSDP2 on the CPU"
)


def on_two_processes(work, *args):
    """Run ``work(rank, *args)`` on two ranks."""
    port = get_free_port()
    torch.multiprocessing.start_processes(joins, (port, work, args), nprocs=2, start_method="fork")


def joins(rank, port, work, args):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": "2", "NODE_RANK": "0"}
    torch.set_num_threads(1)
    work(rank, *args)
