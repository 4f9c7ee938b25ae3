"""Rows of one prompt: `keys` (which belong together), `ranks`, `candidate_ranks`,
`pairs`, `pair_filter` and `quantiles`.
"""
