"""Adapters of trainers, one file each: trl, openrlhf, openrlhf_actor, verl, nemo_rl, ms_swift, minimind.

No trainer is imported until its adapter is used. rollouts reads what trainers hand over and scores it with one of
sources; ppo is PPO on Ray, demo the proof that training works (learning, tiny_policy); errors is the exception tree.
"""
