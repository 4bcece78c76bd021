"""Norms of the residual stream from layer to layer, and attention sinks.

P2 = arXiv 2507.02559: in GPT-2 the residual stream at position 0 is an order of magnitude longer than elsewhere
and heads park their attention there; LN-free models have neither to that degree.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
