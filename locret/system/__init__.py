"""What commands need of the process and its files: no idea of models here.

`interrupts` gives exit statuses and obeys signals, `config_files` finds a configuration by name,
`files` writes whole files or none.
"""
