"""Serving: requests of many clients answered by one engine, with contexts that are read once.

A request comes in by `app.py`, becomes token ids in `fields.py`, waits in `service.py`,
is answered by the one thread that uses the engine (`worker.py`), and goes out by `replies.py`.
`Service` knows no HTTP: `requests.py` is what is passed in and out of it. `contexts.py` keeps what
was read, `page.py` is the page in a browser, `ray_app.py` replicas of all this.
"""
