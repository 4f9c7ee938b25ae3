"""Many callers, one model: `batcher` (the event loop and the worker thread) and `errors`. It knows the engine and no
Ray.
"""
