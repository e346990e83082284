"""Operators in the order in which data flows: fp8, cache, indexer, topk, ragged, attention; then router, rope."""
