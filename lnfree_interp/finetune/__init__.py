"""Remove LayerNorm from a GPT-2 by fine-tuning while one std after another is frozen.

    python -m lnfree_interp.finetune --model gpt2 --preset small --data Skylion007/openwebtext --out DIR

A RemovalSchedule says at which step which LayerNorm goes, a callback applies it, and a loss term keeps the
residual norms even; all else is HF's Trainer. DIR/final is the LN-free checkpoint, a plain GPT2LMHeadModel.

Sources: P1 = arXiv 2409.13710 (the recipe), P2 = arXiv 2507.02559 (running averages, auxiliary loss).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
