"""The model: two towers, projections and heads; token removal and the scores it goes by. Knows nothing of ranks."""
