"""One attention or MoE layer each, as functions of (params, inputs, caches, metadata)."""
