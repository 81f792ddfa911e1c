"""Measuring what a compressed cache still knows, on one path.

`config` is what is asked, under which setups; `questions` every sample (from `locret.tasks`) as a
prompt under every setup; `ask` gets the answers, `records` keeps them and where they come from,
`results` counts, `tables` and `report` show. `evaluate` goes the path, once or again. A metric
belongs to its task, not here.
"""
