from .result import AttributionGraph as AttributionGraph, GraphNode as GraphNode
