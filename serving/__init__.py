"""What carries: the model server, the gateway's configuration, the node agent.

Not here: anything of the control plane. This package boots without Prefect, MLflow, Evidently or pandas.
"""
