"""A result -> a plotly Figure."""
