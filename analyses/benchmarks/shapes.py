"""GPT-2's shapes. Imports nothing heavy."""

SHAPES = {  # n_layers, d_model, n_heads
    "small": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (36, 1280, 20),
    "xl": (48, 1600, 25),
}
