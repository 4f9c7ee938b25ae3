"""Resumable work: `unit_run` (a run), `progress` (what is shown of it), `notes` (what its workers tell), `pipeline`
(units through Ray Data), `ledger` (where a unit is committed), `attempts` (rows that kill a process), `placement`
(actors on a cluster), `exchange` (rows regrouped across one).
"""
