"""The platform's reconciler: one pass after the other, from when the platform is up; beside it, the crier."""

from __future__ import annotations

from threading import Thread

from flows.wiring import configure, herald, ledger

if __name__ == "__main__":
    configure()  # before Prefect is imported: else it would ask a server of its own
    from flows.crier import Crier, keep_crying
    from flows.form import PrefectForms
    from flows.reconcile import keep_reconciling
    from flows.settings import Settings

    def crier() -> Crier:
        return Crier(ledger(Settings()), herald(), PrefectForms())

    Thread(target=keep_crying, args=[crier], name="crier", daemon=True).start()
    keep_reconciling()
