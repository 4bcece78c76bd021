"""GPT-2 without LayerNorm: removal by fine-tuning, and the analyses that become exact once it is gone.

The public names load on first use, so that training needs neither TransformerLens nor plotly.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
