"""The batch door: corpora in, scored Parquet out, on Ray Data.

The commands, each `python -m jobs.<name>`: `score`, `rank`, `pairs`, `best_of_n`, `rewardbench`, `report`, `verify`,
`demo`; `cli` is `rayward`, above them all; `api` has them as functions, and the stage for Ray Data pipelines; `command`
has what their command lines have in common. Below them: `benchmarks`, `generation`, `reporting`; `scoring` and
`grouping`; `runs` (resumable work); `options`; `corpus` (rows in); `intervals`; `errors`. Each imports only what is
further down. `sample.parquet` is the demo's corpus.
"""
