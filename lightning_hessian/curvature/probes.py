"""Random probe vectors v with E[v v'] = I, a function of a key alone.

A probe never touches the global random state: the same (seed, step, micro-batch, rank, index) gives the same vector,
so a resumed run equals an uninterrupted one and the user's own random stream is left as it was.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

_COUNT = itertools.count()


@dataclass(frozen=True)
class ProbeSource:
    """Where the probes of one step come from.

    Args:
        seed: the run's seed.
        step: the optimizer step.
        micro_batch: the batch within the run, which tells the micro-batches of one accumulated step apart.
        rank: the process, so that ranks draw independent probes.

    Example:
        >>> source = ProbeSource(seed=0, step=7)
        >>> bool((source.rademacher(4, index=0) == source.rademacher(4, index=0)).all())
        True
    """

    seed: int = 0
    step: int = 0
    micro_batch: int = 0
    rank: int = 0
    _generators: dict[torch.device, torch.Generator] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def fresh(cls) -> ProbeSource:
        """A source with other probes than any that this method has returned before.

        For loops without Lightning: the seed is that of ``torch.manual_seed``, the step a count of these calls, so that
        a program that is run again draws the same probes. (Another ``torch.manual_seed`` in the same process does not
        begin anew: pass ``ProbeSource(seed, step)`` where it must.)
        """
        return cls(torch.initial_seed(), next(_COUNT))

    def shared(self) -> ProbeSource:
        """The source that has the same probes on every rank."""
        return replace(self, rank=0)

    def generator(self, index: int, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator on ``device`` whose stream depends on the key and ``index`` only."""
        key = f"{self.seed}/{self.step}/{self.micro_batch}/{self.rank}/{index}".encode()
        device = torch.device(device)
        generator = self._generators.setdefault(device, torch.Generator(device))
        return generator.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1)

    def rademacher(
        self, size: int, index: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """A vector of ``size`` independent entries, +1 or -1 with probability 1/2 each."""
        return rademacher(size, self.generator(index, device), dtype)

    def sparse_rademacher(
        self,
        size: int,
        keep: float,
        index: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Element dropout: each entry is 0 with probability 1 - ``keep``, else +-1/sqrt(``keep``), so E[v v'] = I."""
        generator = self.generator(index, device)
        signs = rademacher(size, generator, dtype)
        mask = torch.empty(size, device=device, dtype=dtype).bernoulli_(keep, generator=generator)
        return signs.mul_(mask).mul_(keep**-0.5)

    def kept_tensors(self, count: int, keep: float, index: int) -> tuple[list[int], float]:
        """Tensor dropout: which of ``count`` tensors stay, and the factor that makes v'Hv over them unbiased.

        Each tensor stays with probability q = ``keep``; where none would, one of them, drawn evenly, does. A tensor
        is then kept with probability q' = q + (1 - q)^count / count, and the factor is 1/q'.
        """
        # A stream of its own (negative index): the signs of the kept tensors must not depend on who was kept.
        generator = self.generator(-1 - index)
        kept = (torch.rand(count, generator=generator, device="cpu") < keep).nonzero().flatten().tolist()
        if not kept:
            kept = [int(torch.randint(count, (1,), generator=generator, device="cpu"))]
        return kept, 1 / (keep + (1 - keep) ** count / count)


def rademacher(size: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """A vector of ``size`` independent entries, +1 or -1 with probability 1/2 each, on the generator's device.

    Sixty-four signs are cut from each random word, by a table of the 256 bytes: several times faster than one draw
    for each entry.
    """
    device = generator.device
    words = torch.empty(-(-size // 64), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    return _signs_of_bytes(device, dtype)[words.view(torch.uint8).int()].view(-1)[:size]


@cache
def _signs_of_bytes(device: torch.device, dtype: torch.dtype) -> Tensor:
    bits = torch.arange(256, device="cpu").unsqueeze(1) >> torch.arange(8, device="cpu") & 1
    return (2 * bits - 1).to(device, dtype)
