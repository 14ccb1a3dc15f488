"""What is ordered: the flows, the wiring of ports to adapters, the command line.

Not here: arithmetic, vendor calls.
"""
