from .attribution import edge_attribution as edge_attribution
from .patching import edge_patching as edge_patching
from .result import EdgeEffect as EdgeEffect
from .screen import screen_edges as screen_edges
