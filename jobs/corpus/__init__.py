"""Rows in: `storage` (filesystems, names below a folder, files whole or not at all), `sources` (which files there are,
and what their folders stand for), `hub` (datasets of the Hugging Face Hub), `files` (a corpus, its units and its plan),
`formats`, `lines`, `delimited` and `record_batches` (JSONL, CSV and Arrow), `reader` (units as tables), `features`
(schema metadata), `turns` (cells as messages), `conversations` (rows as conversations, prompts and system prompts),
`preferences` (rows as pairs), `candidates` (rows as lists of responses), `readings` (which columns are read), `stepped`
(rows as answers in steps).
"""
