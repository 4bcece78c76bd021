"""What every claim about an LN-free model is measured with: losses, divergences, calibration, HellaSwag, samples.

Sources: P1 = arXiv 2409.13710, P2 = arXiv 2507.02559.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
