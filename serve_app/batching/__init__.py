"""Many callers, one model: `batcher` (the event loop and the worker thread), `batch_queue` (what waits, and the next
batch), `admission` (how much may wait), `wire` (tokens and scores between processes), `parts` (a list cut for several
of them) and `errors`. It knows the engine and no Ray.
"""
