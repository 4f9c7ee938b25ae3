"""What answers prompts: an OpenAI-compatible endpoint (`http.py`) or a local causal model (`local.py`)."""
