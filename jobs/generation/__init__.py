"""Candidates for prompts, for `jobs.best_of_n`: `candidates` (the plain data), `options`, `source` (the generator of a
job), `endpoint` (an OpenAI-compatible one), `local` (a causal model), `internlm2` (its architecture), `chat_encoder`
(prompts as token ids), `tiny` (the embedded generators), `placement` (actors), `stage` (generating), `choosing`
(scoring and selecting).
"""
