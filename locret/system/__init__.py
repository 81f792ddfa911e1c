"""What commands need of the process and its files: no idea of models here.

`interrupts` gives exit statuses and obeys signals; `memory` keeps what was freed; `files` finds
configurations by name, and writes whole files or none.
"""
