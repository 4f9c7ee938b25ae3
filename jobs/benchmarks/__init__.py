"""RewardBench 1 and 2, for `jobs.rewardbench`: `dataset` (rows as answers), `conversation_file` (answers as a corpus),
`outcome` (figures as plain data), `rewardbench1` and `rewardbench2` (their formulas), `table` (results as Parquet, text
and JSON), `leaderboard` (what the benchmark's own scripts cut). For `jobs.verify`: `published` (scores that authors
publish), `side_by_side` (those of Transformers' own class beside ours) and `taught` (the embedded model on held-out
questions of its kinds).
"""
