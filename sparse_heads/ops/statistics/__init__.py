"""What attention heads do: how focused they are and where they look, without storing their probabilities."""

from .api import AttentionStatistics, attention_statistics
from .similarity import head_similarity

__all__ = ["AttentionStatistics", "attention_statistics", "head_similarity"]
