"""Measuring what a compressed cache still knows, on one path.

`config` is what is asked, `setups` the ways to bound the cache, `questions` every sample (from
`locret.tasks`) as a prompt (`prompts`) under every setup; `asking` gets the answers, `records`
keeps them, `evaluate` runs it all and says where figures come from, `results` counts, `tables`,
`figures` and `report` show, `reproduce` asks a slice again. A metric belongs to its task, not here.
"""
