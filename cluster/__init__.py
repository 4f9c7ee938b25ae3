"""Clusters, and the RLHF door.

serve            the endpoint in one command
connect          the one connection to Ray; node_code: rayward's code on the nodes
plan             GPUs, hours and bytes of a corpus: the command; sizing: its arithmetic
reward_actor     the RLHF door; reward_pool: its parts; rlhf: one adapter a trainer
deploy/          YAML for KubeRay and `ray up`, an image, a dashboard
"""

import serve_app  # noqa: F401  it has a say in how PyTorch starts
