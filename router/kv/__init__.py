"""KV store: states of conversations, saved from engines to disk, so that a swap forgets nothing.

`chain` recognizes the beginning of a request, `store` holds what is saved, `keeper` decides what to save and
restore for one engine. Which engines can do it and how they are asked is known in `engines`.
"""
