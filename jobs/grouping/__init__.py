"""Rows of one prompt: `keys` (which belong together), `exchange` (regrouped on a cluster), `ranks`, `candidate_ranks`,
`pairs`, `pair_filter` and `quantiles`.
"""
