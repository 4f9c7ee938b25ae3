"""Parts of the RLHF door, `cluster.reward_actor`.

pool             RewardActorPool; ensemble: several pools as one
encoder          conversations, texts, ids -> token ids; policy: a policy's ids and texts -> conversations
batch, dispatch  a batch cut and sent to actors; connection: a process's view of a pool
actor            the reward actor; model_holder: its weights, which sleep, wake and are exchanged
supervisor       starts, replaces and changes actors; calls: calls of actors, bounded in time
rewards          scores -> rewards: normalised, clipped, combined, one a token
errors           the exception tree
"""
