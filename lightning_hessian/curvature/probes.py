"""Random probe vectors v with E[v] = 0 and E[v v'] = I: distributions, and reproducible sources.

Probes never use the global random state. The same (seed, step, micro-batch, rank, index) gives the same vector, so a
resumed run equals an uninterrupted one, and the user's own random stream does not change.
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
"""(size, generator, dtype) -> a vector of ``size`` independent entries with mean 0 and variance 1, on the generator's
device. All randomness must come from the generator."""


def rademacher(size: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent entries +1 or -1, with probability 1/2 each. No other distribution gives v'Hv a smaller variance.

    Each random 64-bit word gives 64 signs through a table of the 256 bytes. This is several times faster than one draw
    per entry.
    """
    device = generator.device
    words = torch.empty(-(-size // 64), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    return _signs_of_bytes(device, dtype).index_select(0, words.view(torch.uint8).int()).view(-1)[:size]


@cache
def _signs_of_bytes(device: torch.device, dtype: torch.dtype) -> Tensor:
    bits = torch.arange(256, device="cpu").unsqueeze(1) >> torch.arange(8, device="cpu") & 1
    return (2 * bits - 1).to(device, dtype)


def gaussian(size: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent standard normal entries."""
    return torch.randn(size, generator=generator, device=generator.device, dtype=dtype)


DISTRIBUTIONS: dict[str, Distribution] = {"rademacher": rademacher, "gaussian": gaussian}
"""The distributions by the names used in settings."""


def distribution_of(choice: str | Distribution) -> Distribution:
    """Return the distribution with this name. A function is returned unchanged.

    Raises:
        ValueError: the name is unknown.

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


_FRESH_COUNT = itertools.count()


@dataclass(frozen=True)
class ProbeSource:
    """The source of one step's probes.

    Args:
        seed: the run's seed.
        step: the optimizer step.
        micro_batch: the index of the batch in the run. It distinguishes the micro-batches of one accumulated step.
        rank: the rank of the process, so that ranks draw independent probes.

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
        """Return a source whose probes differ from those of all earlier calls.

        This is for loops without Lightning. The seed is that of ``torch.manual_seed``, and the step counts these
        calls, so a second run of the program draws the same probes. Another ``torch.manual_seed`` in the same process
        does not reset the count: pass ``ProbeSource(seed, step)`` if you need that.
        """
        return cls(torch.initial_seed(), next(_FRESH_COUNT))

    def shared(self) -> ProbeSource:
        """Return the source with the same probes on every rank."""
        return replace(self, rank=0)

    def generator(self, index: int, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a generator on ``device``. Its stream depends only on this source's fields and ``index``."""
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
        """Draw a probe v with E[v v'] = I.

        Args:
            size: the number of entries.
            index: the index of the probe in the step.
            device: the device of v.
            dtype: the dtype of v.
            distribution: the distribution of the entries.
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
        """Tensor dropout: return which of ``count`` tensors to keep, and the factor that makes their v'Hv unbiased.

        Each tensor is kept with probability q = ``keep``. If none is, one uniformly drawn tensor is kept. In total a
        tensor is kept with probability q' = q + (1 - q)^count / count, and the factor is 1/q'.
        """
        # A separate stream (negative index): the entries of the kept tensors must not depend on the selection.
        generator = self.generator(-1 - index)
        kept = (torch.rand(count, generator=generator, device="cpu") < keep).nonzero().flatten().tolist()
        if not kept:
            kept = [int(torch.randint(count, (1,), generator=generator, device="cpu"))]
        return kept, 1 / (keep + (1 - keep) ** count / count)
