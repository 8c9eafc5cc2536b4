"""Parameters, gradients and steps for the tests of Sophia."""

import numpy as np
import torch


# Odd sizes leave tails behind the CPU's vector kernels; one tensor is empty, one has no dimension.
SHAPES = ((5, 7), (33,), (1,), (), (2, 3, 5), (0, 4), (17, 1))
f32 = np.float32


def make_params(seed=0, shapes=SHAPES, spread=1.0):
    random = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(spread * torch.randn(shape, generator=random)) for shape in shapes]


def set_gradients(params, seed):
    """Gradients whose size differs from coordinate to coordinate: some will be at the clip and some will not."""
    random, size_random = torch.Generator().manual_seed(1000 + seed), torch.Generator().manual_seed(0)
    for param in params:
        sizes = 10.0 ** torch.randint(-3, 2, param.shape, generator=size_random)
        param.grad = (sizes * torch.randn(param.shape, generator=random)).to(param.dtype)


def numbers(tensor):
    return tensor.detach().flatten().numpy()


def train(params, optimizer, steps, refresh_every=3):
    for step in steps:
        if step % refresh_every == 0:
            set_gradients(params, 5000 + step)
            optimizer.update_hessian(scale=12.0)
        set_gradients(params, step)
        optimizer.step()


def snapshot(params, optimizer):
    """Weights and state, to be compared with [`assert_same`]."""
    states = [{name: value.clone() for name, value in optimizer.state[p].items()} for p in params]
    return [p.detach().clone() for p in params], states


def assert_same(left, right):
    """The same bits."""
    torch.testing.assert_close(left, right, rtol=0, atol=0)
