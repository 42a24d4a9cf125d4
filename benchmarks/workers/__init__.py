"""The processes that are measured; each obeys commands over its stdin, see `protocol.py`."""
