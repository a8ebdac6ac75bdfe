"""Independent references: dense float64 Hessians and finite differences."""

import copy

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def dense_hessian(module, loss, names=None):
    """The Hessian of ``loss(functional_module)`` by torch.func, as an n x n matrix over the named parameters."""
    parameters = {k: v.detach() for k, v in module.named_parameters()}
    names = list(parameters) if names is None else names
    sizes = [parameters[k].numel() for k in names]

    def of_vector(vector):
        parts = {k: p.view_as(parameters[k]) for k, p in zip(names, vector.split(sizes), strict=True)}

        def call(*args):
            return torch.func.functional_call(module, {**parameters, **parts}, args)

        return loss(call)

    return torch.func.hessian(of_vector)(torch.cat([parameters[k].reshape(-1) for k in names]))


def gradient_by_differences(module, value, step=1e-5):
    """d value(module) / d theta by central differences, one parameter at a time, on a copy."""
    twin = copy.deepcopy(module)
    theta = parameters_to_vector(twin.parameters()).detach().clone()
    gradient = torch.zeros_like(theta)
    for i in range(theta.numel()):
        for sign in (1, -1):
            moved = theta.clone()
            moved[i] += sign * step
            vector_to_parameters(moved, twin.parameters())
            gradient[i] += sign * value(twin).item() / (2 * step)
    return gradient


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()
