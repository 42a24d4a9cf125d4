"""Every public way to call a model, each as a function that gives what the swarm says and what is right.

`test_ways_in.py` tries each for a model without a prompt, with `ptune` and `deep_ptune`, and wrapped by peft;
`python -m tests.client.ways` writes docs/compatibility.md from the same table.
"""
