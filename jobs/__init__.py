"""The batch door: `python -m jobs.<name>`. Parquet corpora in, scored corpora out, on Ray Data."""
