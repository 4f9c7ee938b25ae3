"""RewardBench 1 and 2, for `jobs.rewardbench`: `dataset` (rows as answers), `conversation_file` (answers as a corpus),
`outcome` (figures as plain data), `rewardbench1` and `rewardbench2` (their formulas), `table` (results as Parquet, text
and JSON). And `published`: scores that authors publish, for `jobs.verify`.
"""
