"""Random probe vectors v with E[v] = 0 and E[v v'] = I: their distributions, and where each step's probes come from.

A probe never touches the global random state: the same (seed, step, micro-batch, rank, index) gives the same vector,
so a resumed run equals an uninterrupted one and the user's own random stream is left as it was.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

Distribution = Callable[[int, torch.Generator, torch.dtype], Tensor]
"""(size, generator, dtype) -> a vector of ``size`` independent entries of mean 0 and variance 1, on the generator's
device. All randomness comes from the generator."""


def rademacher(size: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent entries +1 or -1, with probability 1/2 each. Of all distributions v'Hv has the least variance here.

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


def gaussian(size: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent standard normal entries."""
    return torch.randn(size, generator=generator, device=generator.device, dtype=dtype)


DISTRIBUTIONS: dict[str, Distribution] = {"rademacher": rademacher, "gaussian": gaussian}
"""The distributions that settings can name."""


def distribution_of(choice: str | Distribution) -> Distribution:
    """The distribution of that name; a function is taken as it is.

    Raises:
        ValueError: there is none of that name.

    Example:
        >>> distribution_of("rademacher") is rademacher
        True
    """
    if callable(choice):
        return choice
    if choice not in DISTRIBUTIONS:
        raise ValueError(
            f"distribution={choice!r} is unknown. Choose one of {', '.join(DISTRIBUTIONS)}, or pass a function (size, "
            "generator, dtype) -> vector whose entries are independent, with mean 0 and variance 1."
        )
    return DISTRIBUTIONS[choice]


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
        >>> bool((source.draw(4, index=0) == source.draw(4, index=0)).all())
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

    def draw(
        self,
        size: int,
        index: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        distribution: Distribution = rademacher,
        keep: float = 1.0,
    ) -> Tensor:
        """A probe v with E[v v'] = I.

        Args:
            size: its number of entries.
            index: which of the step's probes.
            device: where it lives.
            dtype: its type.
            distribution: of the entries.
            keep: element dropout: each entry is 0 with probability 1 - ``keep``, and otherwise divided by
                sqrt(``keep``).
        """
        generator = self.generator(index, device)
        v = distribution(size, generator, dtype)
        if keep == 1:
            return v
        mask = torch.empty(size, device=device, dtype=dtype).bernoulli_(keep, generator=generator)
        return (v * mask).mul_(keep**-0.5)

    def kept_tensors(self, count: int, keep: float, index: int) -> tuple[list[int], float]:
        """Tensor dropout: which of ``count`` tensors stay, and the factor that makes v'Hv over them unbiased.

        Each tensor stays with probability q = ``keep``; where none would, one of them, drawn evenly, does. A tensor
        is then kept with probability q' = q + (1 - q)^count / count, and the factor is 1/q'.
        """
        # A stream of its own (negative index): the entries of the kept tensors must not depend on which are kept.
        generator = self.generator(-1 - index)
        kept = (torch.rand(count, generator=generator, device="cpu") < keep).nonzero().flatten().tolist()
        if not kept:
            kept = [int(torch.randint(count, (1,), generator=generator, device="cpu"))]
        return kept, 1 / (keep + (1 - keep) ** count / count)
