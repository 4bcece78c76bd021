"""The hyperdimensional probe (arXiv 2509.25045): symbols read off the residual stream, and what wrote them.

Concepts are random vectors of signs; a pair of them is their product, several pairs are the sign of their sum. An
encoder learns to make that vector of the stream at a prompt's last token, and is asked for one concept of a pair by
the other.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
