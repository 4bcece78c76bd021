from .patterns import AttentionPatterns as AttentionPatterns, attention_patterns as attention_patterns
from .residual import ResidualNorms as ResidualNorms, residual_norms as residual_norms
from .sinks import AttentionSinks as AttentionSinks, attention_sinks as attention_sinks
