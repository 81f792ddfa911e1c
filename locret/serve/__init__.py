"""Serving: requests of many clients answered by one engine, with contexts that are read once.

`service.py` is what a server calls (`Service`), `requests.py` what is passed in and out; the engine
is used by one thread alone (`worker.py`). Nothing here knows HTTP.
"""
