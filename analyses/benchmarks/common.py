"""What the benchmarks share: models of real shapes with random weights, interleaved timing, peak memory."""

from __future__ import annotations

import statistics
import threading
import time
import warnings
from collections.abc import Callable

import torch

from lnfree_interp import lens

from .shapes import SHAPES

LOGITS = 2.5  # standard deviation of the logits, about a trained model's
WRITERS = (".W_O", ".W_out", ".o._original_component.weight", "out._original_component.weight")


@torch.no_grad()
def random_model(shape: str, normalised: bool = True, device="cpu", dtype=torch.float32, seed=0, native: bool = True):
    """A model of a shape with random weights: a HookedTransformer or, where there is none, a TransformerBridge.

    native: that of a native model; else, for what a native one cannot (split inputs), of a module of Hugging Face's.

    Every block adds the same share to the stream, activations are of the size of 1 and logits of `LOGITS`, with norms
    and without, so that nothing is denormal and nothing overflows.
    """
    fields = SHAPES[shape] | {"device": str(device), "dtype": dtype, "seed": seed}
    if not normalised:
        fields |= {"normalization_type": None, "final_rms": False}
    model, generator = _empty(fields, native), torch.Generator(device=device).manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 1 and name.endswith((".w", ".weight")):
            p.fill_(1.0)
            continue
        first = name.split(".")[0] in ("embed", "pos_embed", "tok_embed", "pos")
        std = 1.0 if first else fields["d_model"] ** -0.5
        if name.endswith(WRITERS):
            std /= (2 * fields["n_layers"]) ** 0.5
        p.normal_(0.0, std, generator=generator) if p.ndim > 1 else p.normal_(0.0, 0.02, generator=generator)
    tokens = torch.randint(fields["d_vocab"], (2, 16), generator=generator, device=device)
    model.eval().requires_grad_(False)
    model.unembed.W_U.mul_(LOGITS / model(tokens).float().std())
    return model


def _empty(fields: dict, native: bool):
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.model_bridge import TransformerBridge

        kind = fields["normalization_type"]  # a native model has the whole norms alone
        fields = fields | {"normalization_type": kind and kind.removesuffix("Pre")}
        if not native:  # split inputs leave a Bridge's norms without weights out
            return lens.build(fields)
        return TransformerBridge.boot_native(TransformerBridgeConfig(**fields))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return HookedTransformer(HookedTransformerConfig(**fields, init_weights=False))


def synchronise(device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def interleaved(ways: dict[str, Callable[[], object]], repeats: int, device="cpu") -> dict[str, list[float]]:
    """Seconds of each way, run in turn `repeats` times after one unmeasured round; every second round goes backwards.

    So that a machine that slows down as it runs favours none.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(repeats + 1):
        for name, way in list(ways.items())[:: -1 if round_ % 2 else 1]:
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
