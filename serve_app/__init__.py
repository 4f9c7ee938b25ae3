"""The online door: reward models behind an endpoint. The engine all doors share is `serve_app.reward_model`."""
