"""Confidence neurons: ranking them, ablating them, scanning all of a layer.

Sources: P2 = arXiv 2507.02559; the neurons' first description is arXiv 2406.16254.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
