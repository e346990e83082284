"""Named problems, one file per operator: sizes, inputs, float64 answer, bound, bytes, targets."""
