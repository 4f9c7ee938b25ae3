"""Scoring of a corpus: `run` (into a folder), `spec` (which model), `stage`, `pair_stage`, `candidate_stage`,
`turn_stage` and `step_stage` (the actors), `remembered` and `score_memory` (scores that were computed before),
`reward_scorer` (the stage in pipelines of others), `preview` (rows as the model reads them), `estimate` (what a run
would take), `via_serve` and `replica_calls` (a running application as the model), `scored_corpus` (scores that are
there, or are made first).
"""
