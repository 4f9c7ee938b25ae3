"""Rows in: `storage` (filesystems, names below a folder, files whole or not at all), `files` (a corpus and its units),
`reader` (units as tables), `features` (schema metadata), `conversations` (columns as conversations, prompts and system
prompts).
"""
