from .attribution import edge_attribution as edge_attribution
from .result import EdgeEffect as EdgeEffect
