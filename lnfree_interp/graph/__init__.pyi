from .build import attribution_graph as attribution_graph
from .result import AttributionGraph as AttributionGraph, GraphNode as GraphNode
