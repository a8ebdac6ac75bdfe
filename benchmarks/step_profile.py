"""Profile of a penalized step's time, in units of a plain step's time.

    python benchmarks/step_profile.py [--models mlp cnn ...] [--methods plain two_pass taylor ...] [--rounds 5]

Means over rounds from PyTorch's profiler: convolutions, matrix products and attention; all other kernels (element-wise,
norms, copies of parameters, random numbers); and the rest of the wall time, which is Python and autograd overhead. The
last column names the three most expensive other kernels. CPU only. The profiler slows small operations down, so kernels
of small models appear too expensive.
"""

from __future__ import annotations

import argparse
import time

import lightning as L
import step_cost
import torch
from torch.profiler import ProfilerActivity, profile

PRODUCTS = ("conv", "mm", "mkldnn", "attention", "addmv", "dot")


class Profiled(step_cost.Case):
    """A case that profiles its steps."""

    def on_train_start(self) -> None:
        self.all = list(self.parameters())
        self.optimizer = self.configure_optimizers()
        whole = 0.0
        for label, method in self.methods.items():
            method()
            start = time.perf_counter()
            for _ in range(self.arguments.rounds):
                method()
            seconds = (time.perf_counter() - start) / self.arguments.rounds
            whole = seconds if label == "plain" else whole
            with profile(activities=[ProfilerActivity.CPU]) as found:
                for _ in range(self.arguments.rounds):
                    method()
            kernels = {
                event.key.removeprefix("aten::"): event.self_cpu_time_total / 1e6 / self.arguments.rounds
                for event in found.key_averages()
            }
            products = sum(time for name, time in kernels.items() if any(part in name for part in PRODUCTS))
            others = {name: time for name, time in kernels.items() if not any(part in name for part in PRODUCTS)}
            known = products + sum(others.values())
            costly = sorted(others, key=lambda name: -others[name])[:3]
            named = ", ".join(f"{name} {others[name] / whole:.2f}" for name in costly)
            print(
                f"| {self.name} | {label} | {seconds / whole:.2f} | {products / whole:.2f} "
                f"| {sum(others.values()) / whole:.2f} | {max(0.0, seconds - known) / whole:.2f} | {named} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=step_cost.CASES, default=list(step_cost.CASES))
    parser.add_argument("--methods", nargs="+", default=["plain", "two_pass", "gauss_newton", "taylor"])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    arguments.batch, arguments.compile, arguments.bf16 = None, False, False
    print("| model | method | step | products, convolutions | other kernels | the rest | costliest others |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in arguments.models:
        case = Profiled(name, arguments)
        case.name = name
        trainer = L.Trainer(accelerator="cpu", devices=1, max_steps=1, **step_cost.QUIET)
        trainer.fit(case, torch.utils.data.DataLoader(range(2)))


if __name__ == "__main__":
    main()
