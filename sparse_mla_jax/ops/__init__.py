"""Operators in the order in which data flows: fp8, cache, indexer, topk, ragged, attention; router and rope beside them."""
