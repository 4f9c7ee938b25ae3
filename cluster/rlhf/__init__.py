"""The RLHF door: one file per trainer that asks for rewards, over any `RewardSource`. Imports no trainer until used.

Trainers without a file here call the endpoint over HTTP: LLaMA-Factory (`reward_model_type: api`, `reward_model:
http://host:8000/v1/score/evaluation`) and slime (`--rm-type remote_rm --rm-url http://host:8000/rm`); see
`serve_app/web/dialects/`.
"""
