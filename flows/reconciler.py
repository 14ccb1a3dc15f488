"""The platform's reconciler: one pass after the other, from when the platform is up; beside it, the crier."""

from __future__ import annotations

from threading import Thread

from flows.wiring import configure, herald, ledger

if __name__ == "__main__":
    configure()  # before Prefect is imported: else it would ask a server of its own
    from flows.crier import Crier, keep_crying
    from flows.reconcile import keep_reconciling
    from flows.settings import Settings

    Thread(target=keep_crying, args=[lambda: Crier(ledger(Settings()), herald())], name="crier", daemon=True).start()
    keep_reconciling()
