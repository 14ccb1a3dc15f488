"""The platform's reconciler: one pass after the other, from when the platform is up; beside it, the relay."""

from __future__ import annotations

from threading import Thread

from flows.wiring import configure, herald, ledger

if __name__ == "__main__":
    configure()  # before Prefect is imported: else it would ask a server of its own
    from flows.form import PrefectForms
    from flows.reconcile import keep_reconciling
    from flows.relay import Relay, keep_relaying
    from flows.settings import Settings

    def relay() -> Relay:
        book = ledger(Settings())
        return Relay(book, herald(book), PrefectForms())

    Thread(target=keep_relaying, args=[relay], name="relay", daemon=True).start()
    keep_reconciling()
