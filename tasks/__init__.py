"""What is done: one effect each, a Prefect task, written against the protocols in `tasks.ports`.

Not here: a vendor's name (Prefect's aside), the order of things, decisions.
"""
