"""The drop-in for transformers: `model.generate(..., past_key_values=BuzzCache(model, "buzz"))`.

A model of transformers hands each layer's new keys and values to its cache (`Cache.update`), and what it
gets back to its attention function. Both are its public places for extensions: `BuzzCache.update` returns
the keys as a tensor that knows its cache, and the attention function that the model is switched to
(`buzz|sdpa`: ours over the former one) attends in that cache, or, given any other keys, calls the former
function. So calls with and without a `BuzzCache`, in turn or in threads, never touch each other.
"""

from buzz.hf.cache import BuzzCache
from buzz.hf.errors import UnsupportedError

__all__ = ["BuzzCache", "UnsupportedError"]
