"""What results say where plotly, with which they draw themselves, is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def drawing() -> Iterator[None]:
    """Around imports of figures.

    Raises:
        ImportError: there is no plotly.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "plotly":
            raise
        raise ImportError("plot() draws with plotly: pip install 'lnfree_interp[plot]'") from None
