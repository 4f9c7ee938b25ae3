"""RewardBench 1 and 2: rows into conversations, scores into the benchmarks' figures; for `jobs.rewardbench`."""
