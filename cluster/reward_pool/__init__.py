"""What the RLHF door is made of; `cluster/reward_actor.py` is the door."""
