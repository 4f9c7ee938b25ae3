"""Rows in: `storage` (filesystems, files whole or not at all), `files` (a corpus and its units), `reader` (units as
tables), `conversations` (columns as conversations).
"""
