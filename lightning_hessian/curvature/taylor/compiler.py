"""Taylor mode and ``torch.compile``: what the compiler is to trace into a graph, and what it is to leave alone."""

from __future__ import annotations

from types import CodeType

import torch


def never_compile_alone(code: CodeType) -> None:
    """Run a function as it is wherever the compiler does not trace it as a part of another one, with all that it calls.

    In code that a graph break leaves to Python, the mode is called for each operation. The compiler would take it for
    a function of its own. It could not tell the operations apart, and would run one in the place of another.
    """
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))
