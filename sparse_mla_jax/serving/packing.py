"""The host's arrays of a step: the rows of every group, each group padded to the same bucket."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparse_mla_jax.metadata import bucket_for
from sparse_mla_jax.serving.scheduler import Scheduled
from sparse_mla_jax.serving.step import StepInputs


def pad(num_tokens: int, *, rows: int, width: int, groups: int = 1) -> StepInputs:
    """Inputs of a step in which every row is padding.

    Args:
      num_tokens: T, of each group.
      rows: B, of each group.
      width: P, pages of a row.
      groups: of the axis "data".
    """
    rows *= groups
    return StepInputs(
        token_ids=np.zeros(groups * num_tokens, np.int32),
        seq_lens=np.zeros(rows, np.int32),
        query_lens=np.zeros(rows, np.int32),
        page_table=np.full((rows, width), -1, np.int32),
        state_ids=np.full(rows, -1, np.int32),
        temperature=np.zeros(rows, np.float32),
        top_p=np.ones(rows, np.float32),
        seeds=np.zeros(rows, np.uint32),
    )


def pack(batches: Sequence[Sequence[Scheduled]], token_buckets: Sequence[int], *, rows: int, width: int) -> StepInputs:
    """Inputs of a step over one batch a group, newly allocated: the device may still read those of the last step.

    All groups get the smallest bucket that holds the tokens of the fullest.
    """
    counts = [sum(row.num_tokens for row in batch) for batch in batches]
    bucket = bucket_for(max(counts), token_buckets)
    inputs = pad(bucket, rows=rows, width=width, groups=len(batches))
    for group, batch in enumerate(batches):
        start = group * bucket
        for i, row in enumerate(batch, group * rows):
            request = row.request
            inputs.token_ids[start : start + row.num_tokens] = row.token_ids
            start += row.num_tokens
            inputs.seq_lens[i] = row.seq_len
            inputs.query_lens[i] = row.num_tokens
            inputs.page_table[i] = row.page_row
            inputs.state_ids[i] = row.state
            inputs.temperature[i] = request.temperature
            inputs.top_p[i] = request.top_p
            inputs.seeds[i] = request.seed
    return inputs
