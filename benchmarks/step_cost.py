"""Time and peak memory of a training step with a curvature penalty, relative to a plain step in the same run.

    python benchmarks/step_cost.py [--models mlp cnn resnet18 vit gpt lstm] [--methods plain SAM two_pass ...]
                                   [--rounds 7] [--batch N] [--compile] [--bf16]

Every round runs all methods, so that drifts of the machine's speed affect them equally:

- plain: forward, backward, SGD step;
- SAM: two passes, the second at weights displaced along the gradient (Foret et al. 2020);
- sharpness; sharpness, adaptive: `SharpnessAware()`, SAM and ASAM in the callback;
- confidence: `ConfidencePenalty()`, which has no second derivative;
- hand-written: the usual recipe for loss + strength * v'Hv, `torch.autograd.grad` twice on PyTorch's fused operators
  (it requires attention on the math backend). Its gradient through norms is wrong or missing;
- taylor, autograd, gauss_newton, central_difference, two_pass:
  `HessianTrace(method=...)` in the callback, without its logging;
- taylor, 4 probes: the same with `probes=4`;
- two_pass / 4: the same with `every_n_steps=4`, mean of four steps;
- keep 0.5, keep 0.1: autograd with tensor dropout;
- norm; norm, autograd; norm, central_difference: `HessianNorm()`, and with these methods, after the first step;
- taylor, share; two_pass, share: with `strength=GradientShare(0.1)`, on a step on which the share is measured (by
  default every 50th).

Time is the median over rounds. Memory is a step's peak beyond the memory in use before it (on Linux or CUDA), the
median of three steps. The last column of the second table is the callback's overhead on a step without a penalty. gpt
is a small decoder with fused causal attention, lstm has two layers. --compile compiles the network (taylor keeps it
compiled, autograd and gauss_newton run it eagerly); --bf16 uses autocast.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
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
from lightning_hessian.cli import models, sequence_models  # noqa: E402
from lightning_hessian.curvature import ProbeSource  # noqa: E402
from lightning_hessian.curvature.backward_watch import BackwardWatch  # noqa: E402
from lightning_hessian.regularization.callback import enlist  # noqa: E402
from lightning_hessian.regularization.fit import RegularizedFit  # noqa: E402
from lightning_hessian.step.lightning_loop import LightningLoop  # noqa: E402

STRENGTH = 1e-4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {  # input shape, batch size
    "mlp": ((1, 28, 28), 128),
    "cnn": ((1, 28, 28), 128),
    "resnet18": ((3, 32, 32), 32),
    "vit": ((1, 28, 28), 128),
    "gpt": ((128,), 16),
    "lstm": ((64,), 32),
}
METHODS = ["plain", "SAM", "sharpness", "sharpness, adaptive", "confidence", "hand-written", "taylor",
           "taylor, 4 probes", "autograd", "keep 0.5", "keep 0.1", "gauss_newton", "central_difference", "two_pass",
           "two_pass / 4", "norm", "norm, autograd", "norm, central_difference", "taylor, share",
           "two_pass, share"]  # fmt: skip
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class GPT(nn.Module):
    """A small decoder: token and position embeddings, blocks with fused causal attention, a linear head."""

    def __init__(self, tokens: int = 256, length: int = 128, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.size(1)]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(2, (3 * self.heads, -1)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(*heads.chunk(3, dim=1), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class LSTM(sequence_models.LSTM):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).transpose(1, 2)


ON_TOKENS: dict[str, Callable[[], nn.Module]] = {"gpt": GPT, "lstm": functools.partial(LSTM, classes=256)}


class Case(L.LightningModule):
    """A model with one batch, and the steps to compare. They are timed when the fit starts."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        super().__init__()
        shape, batch = CASES[name]
        batch = arguments.batch or batch
        torch.manual_seed(0)
        self.arguments = arguments
        self.net: nn.Module = ON_TOKENS[name]() if name in ON_TOKENS else getattr(models, name)(shape, 10)
        if arguments.compile:
            self.net.compile()
        if name in ON_TOKENS:
            self.x, self.y = torch.randint(0, 256, (2, batch, *shape), device=DEVICE)
        else:
            self.x, self.y = torch.randn(batch, *shape, device=DEVICE), torch.randint(0, 10, (batch,), device=DEVICE)
        self.step_count = 0
        self.results: dict[str, tuple[float, float | None] | str] = {}
        every: dict[str, Callable[[], None]] = {
            "plain": self.plain,
            "SAM": self.sam,
            "hand-written": self.hand_written,
            "taylor": self.penalized(lh.HessianTrace(method="taylor")),
            "taylor, 4 probes": self.penalized(lh.HessianTrace(4, method="taylor")),
            "autograd": self.penalized(lh.HessianTrace(method="autograd")),
            "keep 0.5": self.penalized(lh.HessianTrace(method="autograd", keep=0.5)),
            "keep 0.1": self.penalized(lh.HessianTrace(method="autograd", keep=0.1)),
            "gauss_newton": self.penalized(lh.HessianTrace(method="gauss_newton")),
            "central_difference": self.penalized(lh.HessianTrace(method="central_difference")),
            "two_pass": self.penalized(lh.HessianTrace(method="two_pass")),
            "two_pass / 4": self.every_fourth(),
            "sharpness": self.penalized(lh.SharpnessAware(), 1.0),
            "confidence": self.penalized(lh.ConfidencePenalty(), 0.1),
            "sharpness, adaptive": self.penalized(lh.SharpnessAware(0.5, adaptive=True), 1.0),
            "norm": self.penalized(lh.HessianNorm()),
            "norm, autograd": self.penalized(lh.HessianNorm(method="autograd")),
            "norm, central_difference": self.penalized(lh.HessianNorm(method="central_difference")),
            "taylor, share": self.penalized(lh.HessianTrace(method="taylor"), lh.GradientShare(0.1, every_n_steps=1)),
            "two_pass, share": self.penalized(lh.HessianTrace(method="two_pass"), lh.GradientShare(0.1, 1)),
        }
        self.methods = {label: step for label, step in every.items() if label in arguments.methods}

    def training_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)

    def log(self, *_, **__) -> None:
        pass  # Lightning forbids logging in `on_train_start`

    def on_train_start(self) -> None:
        self.all = list(self.parameters())
        self.optimizer = self.configure_optimizers()
        for label, method in list(self.methods.items()):
            try:
                method()  # warm up, and check that it runs
            except RuntimeError as error:
                self.results[label] = str(error).splitlines()[0]
                del self.methods[label]
        times: dict[str, list[float]] = {label: [] for label in self.methods}
        for _ in range(self.arguments.rounds):
            for label, method in self.methods.items():
                times[label].append(timed(method) / (4 if "/ 4" in label else 1))
        for label, method in self.methods.items():
            peaks = [peak for _ in range(3) if (peak := peak_memory(method)) is not None]
            self.results[label] = statistics.median(times[label]), statistics.median(peaks) if peaks else None

    def loss(self) -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.arguments.bf16):
            return F.cross_entropy(self.net(self.x), self.y)

    def update(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def plain(self) -> None:
        self.update(self.loss())

    def sam(self, rho: float = 0.05) -> None:
        gradients = torch.autograd.grad(self.loss(), self.all)
        scale = rho / torch.stack([g.norm() for g in gradients]).norm()
        moves = [scale * g for g in gradients]
        with torch.no_grad():
            torch._foreach_add_(self.all, moves)
        self.optimizer.zero_grad()
        self.loss().backward()
        with torch.no_grad():
            torch._foreach_sub_(self.all, moves)
        self.optimizer.step()

    def hand_written(self) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            loss = self.loss()
        gradients = torch.autograd.grad(loss, self.all, create_graph=True)
        v = [torch.randint_like(p, 0, 2) * 2 - 1 for p in self.all]
        product = sum((g * u).sum() for g, u in zip(gradients, v, strict=True))
        hv = torch.autograd.grad(product, self.all, create_graph=True)
        self.update(loss + STRENGTH * sum((h * u).sum() for h, u in zip(hv, v, strict=True)))

    def penalized(self, penalty: lh.Penalty, strength: float | lh.GradientShare = STRENGTH) -> Callable[[], None]:
        regularizer, fits = lh.HessianRegularizer(penalty, strength), []

        def step() -> None:
            if not fits:  # the module has a Trainer by now
                fits.append(RegularizedFit(self, LightningLoop(self.trainer, self)))
                enlist(fits[0], [regularizer])
                fits[0].start()
            self.update(fits[0](lambda _: self.loss()))

        return step

    def every_fourth(self) -> Callable[[], None]:
        acting = self.penalized(lh.HessianTrace(method="two_pass"))

        def four() -> None:
            acting()
            for _ in range(3):
                self.plain()

        return four


def timed(method) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    method()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(method) -> float | None:
    """Peak bytes of the step beyond the memory in use before it. None if this cannot be measured."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
        before = _kilobytes("VmRSS")
        method()
        return 1024 * (_kilobytes("VmHWM") - before)
    except OSError:
        return None


def _kilobytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def measure(name: str, arguments: argparse.Namespace) -> dict[str, tuple[float, float | None] | str]:
    """For each method: median seconds and peak bytes, or the error that it raised."""
    case = Case(name, arguments)
    accelerator = "gpu" if DEVICE.type == "cuda" else "cpu"
    trainer = L.Trainer(accelerator=accelerator, devices=1, max_steps=1, **QUIET)
    trainer.fit(case, torch.utils.data.DataLoader(range(2)))
    return case.results


def idle_overhead(rounds: int = 2000) -> float:
    """Seconds that the callback adds to a training step without a penalty."""

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
    trainer = L.Trainer(accelerator="cpu", max_steps=1, callbacks=[callback], **QUIET)
    trainer.fit(module, torch.utils.data.DataLoader(range(2)))
    return statistics.median(module.with_callback) - statistics.median(module.without)


def probe_seconds(name: str, arguments: argparse.Namespace, rounds: int = 30) -> float:
    size = sum(p.numel() for p in Case(name, arguments).parameters())
    source = ProbeSource()
    return statistics.median(timed(lambda: source.draw(size, 0, DEVICE)) for _ in range(rounds))


def check_seconds(name: str, arguments: argparse.Namespace, rounds: int = 30) -> float:
    """Seconds for checking that the gradients are finite, after the backward pass of a penalized step."""
    parameters = list(Case(name, arguments).to(DEVICE).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    awaited = BackwardWatch(torch.ones((), device=DEVICE, requires_grad=True).clone(), parameters, list)
    return statistics.median(timed(awaited.is_finite) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, help="the batch size (32 to 128)")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()

    place = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{os.cpu_count()} CPU cores"
    settings = f"{'compiled, ' * arguments.compile}{'bf16, ' * arguments.bf16}{arguments.rounds} rounds"
    if arguments.batch:
        settings += f", batches of {arguments.batch}"
    print(f"{place}, torch {torch.__version__}, Python {platform.python_version()}, {settings}\n")
    print("| model | method | ms | time / plain | / SAM | / hand-written | peak memory / plain |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    plain = {}
    failures = []
    for name in arguments.models:
        results = measure(name, arguments)
        base_time, base_memory = plain[name] = results["plain"]
        for label in arguments.methods:
            result = results[label]
            if isinstance(result, str):
                print(f"| {name} | {label} | fails | | | | |")
                failures.append(f"{name}, {label}: {result}")
                continue
            seconds, memory = result
            ratios = [f"{seconds / base_time:.2f}"]
            for other in ("SAM", "hand-written"):
                known = isinstance(results.get(other), tuple)
                ratios.append(f"{seconds / results[other][0]:.2f}" if known else "")
            ratios.append(f"{memory / base_memory:.2f}" if memory and base_memory else "n/a")
            print(f"| {name} | {label} | {1000 * seconds:.1f} | {' | '.join(ratios)} |", flush=True)
    for failure in failures:
        print(f"\n{failure}")

    overhead = idle_overhead()
    print("\n| model | drawing a probe / plain | checking the gradients / plain | idle callback / plain |")
    print("| --- | --- | --- | --- |")
    for name in arguments.models:
        seconds = plain[name][0]
        shares = [f"{own(name, arguments) / seconds:.2%}" for own in (probe_seconds, check_seconds)]
        print(f"| {name} | {' | '.join(shares)} | {overhead / seconds:.3%} |")


if __name__ == "__main__":
    main()
