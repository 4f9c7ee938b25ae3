"""Resumable work: `unit_run` (a run and its progress), `pipeline` (units through Ray Data), `ledger` (where a unit is
committed), `attempts` (rows that kill a process), `placement` (actors on a cluster).
"""
