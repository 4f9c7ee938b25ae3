"""Findings in a scored corpus and their page, for `jobs.report`: `columns` (what a report is about), `stage` (passes on
Ray), `scales`, `counts`, `stats`, `pairs` and `extremes` (what the passes sum up), `provenance` (how scores were made),
`figures` and `pair_figures` (drawings), `wording`, `sections`, `page` and its template and style sheet.
"""
