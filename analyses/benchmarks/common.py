"""What the benchmarks share: models of GPT-2's shapes with random weights, interleaved timing, peak memory."""

from __future__ import annotations

import statistics
import threading
import time
import warnings
from collections.abc import Callable

import torch

from .shapes import SHAPES


def random_model(shape: str, normalization_type: str | None = "LNPre", device="cpu", dtype=torch.float32, seed=0):
    """A HookedTransformer of a GPT-2's shape (50,257 tokens, context 1,024), weights normal with std 0.02."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    n_layers, d_model, n_heads = SHAPES[shape]
    cfg = HookedTransformerConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        d_head=d_model // n_heads,
        d_mlp=4 * d_model,
        n_ctx=1024,
        d_vocab=50257,
        act_fn="gelu_new",
        normalization_type=normalization_type,
        init_weights=False,
        device=str(device),
        dtype=dtype,
        seed=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(cfg)
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("ln1.w", "ln2.w", "ln_final.w")):
                p.fill_(1.0)
            else:
                p.normal_(0.0, 0.02, generator=generator)
    return model.eval().requires_grad_(False)


def synchronise(device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def interleaved(ways: dict[str, Callable[[], object]], repeats: int, device="cpu") -> dict[str, list[float]]:
    """Seconds of each way, run in turn `repeats` times after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(repeats + 1):
        for name, way in ways.items():
            synchronise(device)
            start = time.perf_counter()
            way()
            synchronise(device)
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def peak_memory(way: Callable[[], object], device="cpu") -> float:
    """MiB allocated at the peak of one call, beyond what was there before it.

    On the CPU: resident memory sampled every millisecond, the allocator's spare pages given back beforehand.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return _peak_resident(way)


def _resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def _peak_resident(way: Callable[[], object]) -> float:
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, peak, done = _resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], _resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        way()
    finally:
        done.set()
        watcher.join()
    return max(0, peak[0] - before) / 2**20
