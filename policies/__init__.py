"""What is decided: policies, gates, statistics, the rollout machine. Values in, values out.

Not here: the clock, chance, input and output, any vendor. Time and random numbers arrive as arguments.
"""
