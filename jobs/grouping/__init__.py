"""Rows of one prompt: `keys` (which belong together), `exchange` (regrouped on a cluster), `ranks`, `pairs` and
`quantiles`.
"""
