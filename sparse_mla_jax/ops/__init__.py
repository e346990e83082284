"""Operators in the order in which data flows: fp8, cache, indexer, topk, ragged, attention; then router, rope."""

# Operators that have kernels, by their names in `dispatch`. lightning_indexer runs two of them: scores, then top_k.
KERNEL_OPERATORS = (
    "top_k",
    "top_k_merge",
    "top_k_share",
    "indexer_scores",
    "paged_indexer_scores",
    "lightning_indexer",
    "sparse_mla",
    "write",
    "write_index",
    "write_token",
    "norm_rope",
    "compress",
    "split_streams",
    "merge_streams",
    "rotated_projection",
)
# Operators that are plain XLA everywhere.
XLA_OPERATORS = (
    "gather",
    "rotate",
    "biased_grouped_topk",
    "softmax_grouped_topk",
    "sqrt_softplus_topk",
    "hash_route",
    "merge",
    "merge_across",
)
