"""Seconds and memory of one loss with its gradients: broadcast, as one matrix, in chunks of rows.

The peer computes the cosines as the authors' code does, by `cosine_similarity` of (N, 1, D) and
(1, N, D), which holds several N x N x D tensors; losses must agree. Rounds alternate.

    python benchmarks/loss.py
"""

import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fcse.losses import chunked_loss, loss, similarity_matrix

ROUNDS = 7
SIZES, WIDTH = (256, 512, 1024), 768
LARGE, WIDTHS = 65_536, (384, 768)
BROADCASTS, LIMIT = 6, 8 * 2**30  # the peer holds about six N x N x D tensors at its peak


def broadcast_loss(u: Tensor, v: Tensor) -> Tensor:
    return loss(F.cosine_similarity(u.unsqueeze(1), v.unsqueeze(0), dim=-1))


def matrix_loss(u: Tensor, v: Tensor) -> Tensor:
    return loss(similarity_matrix(u, v))


VARIANTS = {"broadcast (peer)": broadcast_loss, "matrix": matrix_loss, "chunked": chunked_loss}


def main() -> None:
    # First the large ones: on Linux a process starts with the peak of the one that started it.
    for width in WIDTHS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            seconds, peak = fresh.submit(large_batch, width).result()
        print(
            f"N = {LARGE:,}, D = {width}: chunked takes {seconds:.0f} s, "
            f"the process at most {peak / 2**30:.2f} GiB",
            flush=True,
        )
    for size in SIZES:
        if BROADCASTS * 4 * size**2 * WIDTH > LIMIT:
            print(f"N = {size:,}, D = {WIDTH}: skipped, the peer would take over 8 GiB")
        else:
            compare(size)


def compare(size: int) -> None:
    u, v = views(size, WIDTH)
    seconds, values = {name: [] for name in VARIANTS}, {}
    for round_ in tqdm(range(ROUNDS + 1), f"N = {size}", leave=False):
        for name, function in VARIANTS.items():
            took, values[name] = timed(function, u, v)
            if round_:  # the first round warms up
                seconds[name].append(took)
    print(f"N = {size:,}, D = {WIDTH}: losses differ by {spread(values.values()):.1e} at most")
    for name, took in seconds.items():
        ratios = [p / t for p, t in zip(seconds["broadcast (peer)"], took, strict=True)]
        print(
            f"  {name:18}{1000 * statistics.median(took):9.1f} ms "
            f"({1000 * min(took):.1f} to {1000 * max(took):.1f})   "
            f"{statistics.median(ratios):6.1f}x the peer ({min(ratios):.1f} to {max(ratios):.1f})"
        )


def large_batch(width: int) -> tuple[float, int]:
    """Seconds, and the largest resident size in bytes that this process ever had."""
    seconds, _ = timed(chunked_loss, *views(LARGE, width))
    return seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed(
    function: Callable[[Tensor, Tensor], Tensor], u: Tensor, v: Tensor
) -> tuple[float, float]:
    u.grad = v.grad = None
    started = time.perf_counter()
    value = function(u, v)
    value.backward()
    return time.perf_counter() - started, value.item()


def views(size: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(size, width, generator=generator)
    v = u + torch.randn(size, width, generator=generator)
    return u.requires_grad_(), v.requires_grad_()


def spread(values) -> float:
    values = list(values)
    return max(values) - min(values)


if __name__ == "__main__":
    main()
