"""The scheduler against vLLM's: scripted cases, logs of real decisions, and their replay in perfsim's engines.

`script.py` says what is asked, `record.py` asks vLLM and writes `cases/*.json`, `replay.py` asks perfsim, `compare.py`
prints how often both decide the same.
"""
