"""The RLHF door behind `cluster/reward_actor.py`: `pool` (the face), `encoder` and `policy` (conversations to token
ids), `batch` (one batch's way), `connection` (a process's way to a pool), `supervisor` (starts and replaces actors),
`dispatch` (parts to actors), `actor` and `model_holder` (the process that scores), `calls` (bounded waits), `ensemble`
and `rewards` (what is done with scores), `errors`.
"""
