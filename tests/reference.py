"""Algorithm 1 of "Adversarial Training for Free!" (arXiv 1904.12843), written out: the oracle."""

import torch
from torch.nn import functional


def network(dtype=torch.float32):
    """A small network without batch statistics, the same at each call."""
    torch.manual_seed(7)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 6, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(6 * 5 * 5, 4),
    ).to(dtype)


def batches(sizes=(8, 8, 3), dtype=torch.float32, seed=0):
    """Images in [0, 1], a third of the pixels exactly black or white."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for size in sizes:
        x = torch.rand(size, 2, 5, 5, generator=generator, dtype=torch.float64)
        x = ((x - 0.5) * 1.5 + 0.5).clamp(0, 1).to(dtype)
        result.append((x, torch.randint(0, 4, (size,), generator=generator)))
    return result


def free_training(model, optimizer, loader, *, eps, m, epochs, window=1):
    """Yield `delta` after each update of it and of the weights; the minibatches of a window take turns."""
    size = max(len(x) for x, _ in loader)
    deltas = torch.zeros((window, size, *loader[0][0].shape[1:]), dtype=loader[0][0].dtype)
    for _ in range(epochs):
        for first in range(0, len(loader), window):
            for _ in range(m):
                for (x, y), delta in zip(loader[first : first + window], deltas, strict=False):
                    n = len(x)
                    x_adv = (x + delta[:n]).clamp(0, 1).requires_grad_()  # its gradient is taken
                    loss = functional.cross_entropy(model(x_adv), y)
                    optimizer.zero_grad()
                    loss.backward()
                    delta[:n] = (delta[:n] + eps * x_adv.grad.sign()).clamp(-eps, eps)
                    optimizer.step()
                    yield deltas.flatten(0, 1).clone()
