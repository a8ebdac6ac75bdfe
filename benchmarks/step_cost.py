"""Time and peak memory of one training step, plain and with a curvature penalty, as ratios within one run.

    python benchmarks/step_cost.py [--models mlp cnn resnet18 vit] [--rounds 7]

Methods, in turn in every round, so that a machine whose speed drifts treats them alike:

- plain: forward, backward, SGD step;
- SAM: two passes, the second at the weights moved along the gradient (Foret et al. 2020);
- hand-written: the usual recipe for loss + strength * v'Hv, `torch.autograd.grad` twice on PyTorch's fused operators
  (attention on the math backend, without which it does not run). Its gradient is wrong or missing through norms;
- autograd: `HessianTrace()` inside `higher_order()`, as in the callback without its logging;
- keep 0.5, keep 0.1: the same with tensor dropout.

The time is the median over rounds; the memory what one step needs beyond the model at rest (on Linux or CUDA). The
last column of the second table is the callback's own work on a step where it does not act.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

import lightning as L  # noqa: E402

import lightning_hessian as lh  # noqa: E402
from lightning_hessian.curvature import ProbeSource  # noqa: E402
from lightning_hessian.training import models  # noqa: E402

STRENGTH = 1e-3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {  # input shape, batch size
    "mlp": ((1, 28, 28), 128),
    "cnn": ((1, 28, 28), 128),
    "resnet18": ((3, 32, 32), 32),
    "vit": ((1, 28, 28), 128),
}


class Case:
    """A model with one batch, and the steps to be compared."""

    def __init__(self, name: str) -> None:
        shape, batch = CASES[name]
        torch.manual_seed(0)
        self.net: nn.Module = getattr(models, name)(shape, 10).to(DEVICE)
        self.x = torch.randn(batch, *shape, device=DEVICE)
        self.y = torch.randint(0, 10, (batch,), device=DEVICE)
        self.parameters = list(self.net.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-4)
        self.step = 0
        self.methods = {
            "plain": self.plain,
            "SAM": self.sam,
            "hand-written": self.hand_written,
            "autograd": lambda: self.penalised(lh.HessianTrace()),
            "keep 0.5": lambda: self.penalised(lh.HessianTrace(keep=0.5)),
            "keep 0.1": lambda: self.penalised(lh.HessianTrace(keep=0.1)),
        }

    def loss(self) -> torch.Tensor:
        return F.cross_entropy(self.net(self.x), self.y)

    def update(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def plain(self) -> None:
        self.update(self.loss())

    def sam(self, rho: float = 0.05) -> None:
        gradients = torch.autograd.grad(self.loss(), self.parameters)
        scale = rho / torch.stack([g.norm() for g in gradients]).norm()
        moves = [scale * g for g in gradients]
        with torch.no_grad():
            torch._foreach_add_(self.parameters, moves)
        self.optimizer.zero_grad()
        self.loss().backward()
        with torch.no_grad():
            torch._foreach_sub_(self.parameters, moves)
        self.optimizer.step()

    def hand_written(self) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            loss = self.loss()
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=True)
        v = [torch.randint_like(p, 0, 2) * 2 - 1 for p in self.parameters]
        product = sum((g * u).sum() for g, u in zip(gradients, v, strict=True))
        hv = torch.autograd.grad(product, self.parameters, create_graph=True)
        self.update(loss + STRENGTH * sum((h * u).sum() for h, u in zip(hv, v, strict=True)))

    def penalised(self, penalty: lh.Penalty) -> None:
        with lh.higher_order(self.net):
            loss = self.loss()
        self.step += 1
        context = lh.StepContext(loss, dict(self.net.named_parameters()), ProbeSource(step=self.step))
        self.update(loss + STRENGTH * penalty(context))


def timed(method) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    method()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(method) -> float | None:
    """Bytes that the step needs at its peak beyond what is there before it; None where that cannot be measured."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _kilobytes("VmRSS")
        method()
        return 1024 * (_kilobytes("VmHWM") - before)
    except OSError:
        return None


def _kilobytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def measure(name: str, rounds: int) -> dict[str, tuple[float, float | None] | str]:
    """For each method: median seconds and peak bytes, or why it does not run."""
    case = Case(name)
    results: dict[str, tuple[float, float | None] | str] = {}
    for label, method in list(case.methods.items()):
        try:
            method()  # warm up, and see whether it runs at all
        except RuntimeError as error:
            results[label] = str(error).splitlines()[0]
            del case.methods[label]
    times: dict[str, list[float]] = {label: [] for label in case.methods}
    for _ in range(rounds):
        for label, method in case.methods.items():
            times[label].append(timed(method))
    for label, method in case.methods.items():
        results[label] = statistics.median(times[label]), peak_memory(method)
    return results


def idle_overhead(rounds: int = 2000) -> float:
    """Seconds that the callback adds to a training step on which it does not act."""

    class Nothing(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        def on_train_start(self) -> None:
            for step, seconds in ((self.training_step, self.with_callback), (self.bare, self.without)):
                for _ in range(rounds):
                    start = time.perf_counter()
                    step(None, 0)
                    seconds.append(time.perf_counter() - start)

    module = Nothing()
    module.bare = module.training_step
    module.with_callback, module.without = [], []
    callback = lh.HessianRegularizer(lh.HessianTrace(), strength=0.0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=1, callbacks=[callback], enable_model_summary=False, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(range(2)))
    return statistics.median(module.with_callback) - statistics.median(module.without)


def probe_seconds(name: str, rounds: int = 30) -> float:
    size = sum(p.numel() for p in Case(name).parameters)
    source = ProbeSource()
    return statistics.median(timed(lambda: source.rademacher(size, 0, DEVICE)) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()

    place = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"{place}, torch {torch.__version__}, Python {platform.python_version()}, {arguments.rounds} rounds\n")
    print("| model | method | time / plain | time / hand-written | peak memory / plain |")
    print("| --- | --- | --- | --- | --- |")
    plain = {}
    failures = []
    for name in arguments.models:
        results = measure(name, arguments.rounds)
        base_time, base_memory = plain[name] = results["plain"]
        by_hand = results["hand-written"]
        for label, result in results.items():
            if isinstance(result, str):
                print(f"| {name} | {label} | fails | | |")
                failures.append(f"{name}, {label}: {result}")
                continue
            seconds, memory = result
            against = "" if isinstance(by_hand, str) else f"{seconds / by_hand[0]:.2f}"
            memory_ratio = f"{memory / base_memory:.1f}" if memory and base_memory else "n/a"
            print(f"| {name} | {label} | {seconds / base_time:.2f} | {against} | {memory_ratio} |", flush=True)
    for failure in failures:
        print(f"\n{failure}")

    overhead = idle_overhead()
    print("\n| model | drawing a probe / plain | idle callback / plain |\n| --- | --- | --- |")
    for name in arguments.models:
        seconds = plain[name][0]
        print(f"| {name} | {probe_seconds(name) / seconds:.2%} | {overhead / seconds:.3%} |")


if __name__ == "__main__":
    main()
