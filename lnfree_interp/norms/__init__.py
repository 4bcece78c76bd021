"""Norms of the residual stream from layer to layer, and attention sinks.

P2 = arXiv 2507.02559: in GPT-2 the residual stream at position 0 is an order of magnitude longer than elsewhere
and heads park their attention there; LN-free models have neither to that degree.
"""

from .residual import ResidualNorms, residual_norms
from .sinks import AttentionSinks, attention_sinks

__all__ = ["AttentionSinks", "ResidualNorms", "attention_sinks", "residual_norms"]
