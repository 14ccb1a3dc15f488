"""What is bound: the adapters, `port_vendor.py`, each the only importer of its vendor, and the files to deploy.

Not here: decisions, the order of things.
"""
