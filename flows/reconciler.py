"""The platform's reconciler: one pass after the other, from when the platform is up."""

from __future__ import annotations

from flows.wiring import configure

if __name__ == "__main__":
    configure()  # before Prefect is imported: else it would ask a server of its own
    from flows.reconcile import keep_reconciling

    keep_reconciling()
