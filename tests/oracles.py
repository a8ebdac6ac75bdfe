"""Independent references: dense float64 Hessians, and differences of ordinary first-order gradients."""

from fnmatch import fnmatch

import torch
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lightning_hessian.curvature import ProbeSource

DIFFERENCES = ("two_pass", "central_difference")
"""The methods of HessianTrace that ``by_differences`` is the truth of."""


def dense_hessian(module, loss, names=None):
    """The Hessian of ``loss(call)`` by torch.func; ``call`` is the module as a function."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    names = list(parameters) if names is None else names
    sizes = [parameters[name].numel() for name in names]

    def of_vector(vector):
        parts = {name: p.view_as(parameters[name]) for name, p in zip(names, vector.split(sizes), strict=True)}
        return loss(lambda *args: torch.func.functional_call(module, {**parameters, **parts}, args))

    return torch.func.hessian(of_vector)(torch.cat([parameters[name].reshape(-1) for name in names]))


class Differences:
    """v'Hv and its gradient from nothing but first-order gradients of the module as PyTorch runs it."""

    def __init__(self, module, loss, step=3e-4):
        self.module = module
        self.loss = loss
        self.step = step
        self.buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        self.theta = parameters_to_vector(module.parameters()).detach().clone()

    def gradient(self, theta):
        with torch.no_grad():
            for buffer, before in self.buffers:
                buffer.copy_(before)
        vector_to_parameters(theta, self.module.parameters())
        torch.manual_seed(0)
        gradient = gradient_of(self.loss(self.module), self.module.parameters())
        vector_to_parameters(self.theta, self.module.parameters())
        return gradient.detach()

    def quadratic_form(self, v):
        return self._derivative(lambda t: self.gradient(self.theta + t * v) @ v).item()

    def gradient_of_quadratic_form(self, v):
        """d(v'Hv)/d theta = d^2/dt^2 g(theta + t v) at t = 0, the whole vector at once."""
        h = self.step  # five-point rule, error O(h^4)
        g = {k: self.gradient(self.theta + k * h * v) for k in (-2, -1, 0, 1, 2)}
        return (16 * (g[1] + g[-1]) - (g[2] + g[-2]) - 30 * g[0]) / (12 * h**2)

    def _derivative(self, f):
        h = self.step  # five-point rule, error O(h^4)
        return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


def hessian_by_differences(module, loss, step=1e-5):
    """From first-order gradients alone (torch.func's is wrong through batch norm in training mode)."""
    of = Differences(module, loss)
    directions = torch.eye(len(of.theta), dtype=of.theta.dtype)
    rows = [(of.gradient(of.theta + step * e) - of.gradient(of.theta - step * e)) / (2 * step) for e in directions]
    return (torch.stack(rows) + torch.stack(rows).T) / 2


def by_differences(method, module, loss, strength, **key):
    """The gradient that a step with a penalty by differences trains with: g + strength (g+ + g- - 2 g) / e^2."""
    parameters = list(module.parameters())
    theta = parameters_to_vector(parameters).detach().clone()

    def gradient(at):
        vector_to_parameters(at, parameters)
        found = gradient_of(loss(module), parameters)
        vector_to_parameters(theta, parameters)
        return found

    v = ProbeSource(0, **key).draw(len(theta), 0, dtype=theta.dtype)
    e = (2 * strength) ** 0.5
    if method == "central_difference":
        e = torch.finfo(theta.dtype).eps ** 0.25 / 2 * theta.square().mean().sqrt().item()
    middle = gradient(theta)
    return middle + strength / e**2 * (gradient(theta + e * v) + gradient(theta - e * v) - 2 * middle)


def loss_by_differences(method, module, loss, strength, **key):
    """A scalar whose gradient is that of ``by_differences``."""
    return parameters_to_vector(module.parameters()) @ by_differences(method, module, loss, strength, **key)


def gradient_by_differences(function, module, directions=None, step=1e-4):
    """The gradient of a function of no arguments by the module's parameters, or the derivatives along directions."""
    theta = parameters_to_vector(module.parameters()).detach().clone()

    def at(vector):
        vector_to_parameters(vector, module.parameters())
        value = float(function())
        vector_to_parameters(theta, module.parameters())
        return value

    found = []  # five-point rule, error O(step^4)
    for direction in torch.eye(len(theta), dtype=theta.dtype) if directions is None else directions:
        e = step * direction
        found.append((8 * (at(theta + e) - at(theta - e)) - (at(theta + 2 * e) - at(theta - 2 * e))) / (12 * step))
    return torch.tensor(found, dtype=theta.dtype)


def gradient_of(value, tensors):
    """The gradient as one vector, 0 where a tensor is not used."""
    return flat(torch.autograd.grad(value, list(tensors), allow_unused=True, materialize_grads=True))


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def relative_error(actual, expected):
    return (torch.as_tensor(actual) - torch.as_tensor(expected)).norm().item() / max(
        torch.as_tensor(expected).norm().item(), 1e-300
    )


def sharp_loss(module, batch, rho=0.05, adaptive=False, parameters="*", strength=1.0, gradients_from=None):
    """(1 - strength) L(w) + strength L(w + e), with e = rho t^2 g / ||t g||, t = |w| or 1, a constant."""
    named = dict(module.net.named_parameters())

    def task_loss(batch):
        return F.cross_entropy(module.net(batch[0]), batch[1])

    loss = task_loss(batch)
    source = loss if gradients_from is None else task_loss(gradients_from)
    g = dict(zip(named, torch.autograd.grad(source, list(named.values()), retain_graph=True), strict=True))
    moving = [name for name in named if fnmatch(f"net.{name}", parameters)]
    t = {name: named[name].detach().abs() if adaptive else 1.0 for name in moving}
    norm = sum((t[name] * g[name]).square().sum() for name in moving).sqrt()
    moved = {name: w + (rho * t[name] ** 2 * g[name] / norm if name in moving else 0) for name, w in named.items()}
    x, y = batch
    there = F.cross_entropy(torch.func.functional_call(module.net, moved, (x,)), y)
    return (1 - strength) * loss + strength * there
