"""PyTorch's own test databases: v'Hv and its gradient through every operator and module, right or refused by name.

The truth are second differences of ordinary first-order gradients, in float64, of the operator as PyTorch runs it.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice

import pytest
import torch
from oracles import flat, gradient_of
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_flatten, tree_unflatten

import lightning_hessian as lh
from lightning_hessian.curvature import HessianOperator
from lightning_hessian.curvature.taylor import taylor_mode

EXCLUDED = {
    "nn.functional.cosine_embedding_loss": "its targets are compared with 1 and -1: moved targets are another function",
    "nn.functional.hinge_embedding_loss": "likewise",
    "nn.KLDivLoss": "its samples are not probabilities, and the loss is not finite",
}
# PyTorch's second derivative is NaN at these samples (equal points, or a logarithm of zero), and so is the penalty or
# its gradient: `on_nonfinite` acts.
NOT_FINITE = {"nn.functional.pdist", "cdist", "logcumsumexp", "masked.logaddexp"}
STEPS = 1e-3, 3e-4


def scalar(outputs):
    """A curved function of all outputs, so that no derivative is zero by itself."""
    total = torch.zeros(())
    for index, y in enumerate(t for t in tree_flatten(outputs)[0] if isinstance(t, Tensor)):
        y = y if y.layout == torch.strided else y.to_dense()
        y = torch.stack([y.real, y.imag]) if y.is_complex() else y
        if y.is_floating_point():
            weights = torch.rand(y.shape, generator=torch.Generator().manual_seed(index)) + 0.5
            total = total + (weights * (y + y.square())).sum()
    return total


class Case:
    """A scalar function of real leaves.

    Args:
        name: of the operator.
        function: of tensors in the places of ``tensors``.
        tensors: real or complex; a complex one is made of two leaves.
        alone: the only tensor to differentiate by; the others are constants.
        strided: hand over views that are not contiguous.
    """

    def __init__(self, name, function, tensors, alone=None, strided=False):
        self.name = name
        self.function = function
        self.tensors = [tensor.detach() for tensor in tensors]
        self.moved = [i for i in range(len(tensors)) if alone in (None, i)]
        self.strided = strided
        self.leaves = []
        for i in self.moved:
            t = self.tensors[i]
            self.leaves += [t.real.clone(), t.imag.clone()] if t.is_complex() else [t.clone()]

    def __call__(self, leaves):
        torch.default_generator.manual_seed(0)  # torch.manual_seed takes longer than the operator
        leaves, tensors = list(leaves), list(self.tensors)
        for i in self.moved:
            x = leaves.pop(0)
            tensors[i] = torch.complex(x, leaves.pop(0)) if tensors[i].is_complex() else x.clone()
        if self.strided:
            tensors = [t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t for t in tensors]
        return scalar(self.function(tensors))

    def outcome(self, method):
        """right, refused, not finite, or what is wrong; None where there is no truth to compare with."""
        generator = torch.Generator().manual_seed(3)
        v = [torch.randn(leaf.shape, generator=generator) for leaf in self.leaves]
        try:
            (form, gradient, size), (again, gradient_again, _) = (self._truth(v, step) for step in STEPS)
        except Exception:  # PyTorch itself cannot
            return None
        if not all(bool(torch.as_tensor(found).isfinite().all()) for found in (form, gradient, again, gradient_again)):
            return None
        if error(form, again, 1e-6 * size) > 1e-3:
            return None  # a kink: differences do not converge
        leaves = [leaf.clone().requires_grad_() for leaf in self.leaves]
        try:
            loss, found, explained = METHODS[method](self, leaves, v)
            trained = [torch.zeros_like(leaf) for leaf in leaves]
            with explained:
                if found.requires_grad:
                    trained = torch.autograd.grad(found, leaves, allow_unused=True, materialize_grads=True)
        except lh.HigherOrderError:
            return "refused"
        except Exception as raw:
            return f"raw: {type(raw).__name__}: {str(raw)[:100]}"
        if error(loss.detach(), self(self.leaves), 0) > 1e-8:
            return f"another loss: {loss.item()}"
        if not (found.isfinite() and flat(trained).isfinite().all()):
            return "not finite"
        if error(found.detach(), form, 1e-6 * size) > 2e-3:
            return f"v'Hv is {found.item():.5g}, not {form.item():.5g}"
        sharp = error(gradient, gradient_again, 1e-4 * size) < 1e-2
        if sharp and error(flat(trained), gradient, 1e-4 * size) > 2e-2:
            return f"the gradient is off by {error(flat(trained), gradient, 1e-4 * size):.2g}"
        return "right"

    def _truth(self, v, h):
        def gradient(k):
            leaves = [(leaf + k * h * part).requires_grad_() for leaf, part in zip(self.leaves, v, strict=True)]
            return gradient_of(self(leaves), leaves).detach()

        g = {k: gradient(k) for k in (-2, -1, 0, 1, 2)}
        form = (8 * (g[1] - g[-1]) - (g[2] - g[-2])) / (12 * h) @ flat(v)
        return form, (16 * (g[1] + g[-1]) - (g[2] + g[-2]) - 30 * g[0]) / (12 * h**2), max(1.0, g[0].norm().item())


def by_autograd(case, leaves, v):
    context = lh.higher_order()
    with context, context.explained():
        loss = case(leaves)
        form = HessianOperator(loss, leaves, differentiable=True).quadratic_form(flat(v))
    return loss, form, context.explained()


def by_taylor_mode(case, leaves, v):
    with taylor_mode(leaves, [v]) as mode:
        loss = case(leaves)
    return loss, mode.second(loss), nullcontext()


METHODS = {"autograd": by_autograd, "taylor": by_taylor_mode}


def error(actual, expected, scale):
    size = max(actual.norm().item(), expected.norm().item(), scale, 1e-12)
    return (actual - expected).norm().item() / size


def differentiable(value):
    wanted = isinstance(value, Tensor) and value.requires_grad and value.layout == torch.strided
    return wanted and not isinstance(value, torch.nn.parameter.UninitializedTensorMixin)


def of_operators(dtype, samples, inplace=False, alone=False, strided=False):
    for op in op_db:
        call = op.inplace_variant if inplace else op.op
        if call is None or dtype not in op.supported_dtypes("cpu") or not op.supports_autograd:
            continue
        for sample in islice(op.sample_inputs("cpu", dtype, requires_grad=True), samples):
            values, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
            places = [i for i, value in enumerate(values) if differentiable(value)]

            def function(tensors, op=op, call=call, sample=sample, values=values, spec=spec, places=places):
                fresh = [value.detach().clone() if isinstance(value, Tensor) else value for value in values]
                for place, tensor in zip(places, tensors, strict=True):
                    fresh[place] = tensor
                x, args, kwargs = tree_unflatten(fresh, spec)
                y = op.gradcheck_wrapper(call, x, *args, **kwargs)
                return y if sample.output_process_fn_grad is None else sample.output_process_fn_grad(y)

            for only in range(len(places)) if alone and len(places) > 1 else [None] * (not alone):
                yield Case(op.name, function, [values[i] for i in places], only, strided)


def of_modules(dtype, samples):
    for info in module_db:
        for training in (True, False) if info.train_and_eval_differ else (True,):
            for sample in islice(info.module_inputs_func(info, "cpu", dtype, True, training), samples):
                made = sample.constructor_input
                module = info.module_cls(*made.args, **made.kwargs).train(training)
                if any(isinstance(p, torch.nn.parameter.UninitializedTensorMixin) for p in module.parameters()):
                    continue
                named = dict(module.to(dtype).named_parameters())
                values, spec = tree_flatten((sample.forward_input.args, sample.forward_input.kwargs))
                places = [i for i, value in enumerate(values) if differentiable(value)]

                def function(tensors, module=module, named=named, values=values, spec=spec, places=places):
                    fresh = list(values)
                    for place, tensor in zip(places, tensors[len(named) :], strict=True):
                        fresh[place] = tensor
                    state = dict(zip(named, tensors[: len(named)], strict=True))
                    state |= {name: buffer.clone() for name, buffer in module.named_buffers()}
                    args, kwargs = tree_unflatten(fresh, spec)
                    return torch.func.functional_call(module, state, args, kwargs)

                yield Case(info.name, function, [*named.values(), *(values[i] for i in places)])


WALKS = {
    "operators": lambda: of_operators(torch.float64, 3),
    "operators in place": lambda: of_operators(torch.float64, 3, inplace=True),
    "operators, one tensor alone": lambda: of_operators(torch.float64, 2, alone=True),
    "operators on strided tensors": lambda: of_operators(torch.float64, 2, strided=True),
    "operators on complex tensors": lambda: of_operators(torch.complex128, 2),
    "complex operators in place": lambda: of_operators(torch.complex128, 3, inplace=True),
    "modules": lambda: of_modules(torch.float64, 5),
}


def walked(walk, method):
    """How many cases have which outcome, and what is wrong."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny
    torch.set_default_dtype(torch.float64)
    try:
        counted, bad = Counter(), []
        for case in WALKS[walk]():
            size = sum(leaf.numel() for leaf in case.leaves)
            if case.name in EXCLUDED or not 0 < size <= 3000:
                continue
            outcome = case.outcome(method)
            counted[outcome] += 1
            expected = outcome in (None, "right", "refused") or (outcome == "not finite" and case.name in NOT_FINITE)
            if not expected:
                bad.append(f"{case.name}: {outcome}")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
    return counted, bad


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("walk", WALKS)
def test_right_or_refused_by_name(walk, method):
    # The databases look at the stack for each sample, which takes long where it is as deep as pytest's.
    with ThreadPoolExecutor(1) as thread:
        counted, bad = thread.submit(walked, walk, method).result()
    assert bad == []
    # Most cases have a truth, and are right. (Of complex operators and writes in place Taylor mode refuses more.)
    share = 0.85 if method == "autograd" else 0.85 if walk in ("operators", "modules") else 0.2
    assert counted["right"] > share * (counted.total() - counted[None]) > 30, counted
