"""Implementations of other libraries that `bench` times for comparison."""

from __future__ import annotations

import statistics


def torch_topk(rows: int, columns: int, k: int, *, calls: int) -> float | str:
    """Median microseconds of torch.topk on random float32 scores by CUDA events, after one untimed call.

    Raises:
      ModuleNotFoundError: torch is not installed.
    """
    import torch  # type: ignore[import-not-found, unused-ignore]

    if not torch.cuda.is_available():
        return "torch has no CUDA"
    scores = [torch.randn(rows, columns, device="cuda") for _ in range(2)]
    torch.topk(scores[0], k, dim=1)
    times = []
    for call in range(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.topk(scores[(call + 1) % 2], k, dim=1)
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    del scores
    torch.cuda.empty_cache()
    return statistics.median(times)
