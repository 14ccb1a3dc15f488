"""A rollout's page says to somebody who is woken at night what happens, why, what comes next, and what to do."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from flows.orders import order
from flows.page import Seen, Shown, moment, page, stages, table, text
from flows.publish import artifact_key
from flows.rollout import Progress
from policies.events import Failed, Phase, to_body
from policies.rollout import step
from tasks.ports import Entry
from tests.stories.world import POLICY, World


def pages(world: World) -> list[str]:
    """The page after each look of a rollout, and at its end."""
    world.drive()
    return [shown(each) for each in world.seen if each.reports or each.state.ended]


def shown(progress: Progress) -> str:
    seen = (
        Seen(progress.event.at, progress.reports, progress.evidence, progress.nearest()) if progress.reports else None
    )
    return page(Shown("r1", progress.state, "local", progress.event.at, seen, {"MLflow": "http://there/#/models/m"}))


def test_each_look_says_verdict_traffic_gates_what_comes_next_and_what_would_change_it() -> None:
    told = [text for text in pages(World()) if "canary 20 %" in text.splitlines()[0] and "**PASS**" in text]
    looked = told[-1]
    assert looked.startswith("# m v2 → local: canary 20 %\n")
    assert "canary 50 % comes next" in looked
    assert "If that is still so, from 20" in looked
    assert "Without enough evidence by 20" in looked
    assert "it goes back" in looked
    assert "| live traffic | 80 % | 20 % |" in looked
    assert "`lockgate abort m --reason …`" in looked
    assert "[MLflow](http://there/#/models/m)" in looked
    assert "| errors | pass | errors 0.00%" in looked
    would = looked.split("What would change it:")[1]
    assert "\n- errors: " in would
    assert "\n- traffic: a share below" in would


def test_a_rollback_says_why_and_a_halt_says_that_a_person_is_needed() -> None:
    gone_back = pages(World().given("2", errors=0.5))[-1]
    assert "**Rolled back**: errors" in gone_back
    assert "lockgate explain m" in gone_back
    world = World()
    world.drive()
    promoting = next(each for each in world.seen if each.state.phase is Phase.PROMOTING)
    assert "it stops half-way, and a person is paged." in shown(promoting)
    stuck = Failed(promoting.event.at, 10**6, promoting.state.pending[0].id, "no answer", final=True)
    halt = page(Shown("r1", step(promoting.state, stuck)[0], "local", 0.0))
    assert "**A person is needed.**" in halt
    assert "lockgate rollback m" in halt
    assert "Who serves is not known" in halt
    halted = Entry(10**6, "r1", 10**6, promoting.event.at, "test", *to_body(stuck), "", "")
    last = stages([*[each for each in world.ledger.read("r1") if each.number <= promoting.event.number], halted])[-1]
    assert (last["stage"], last["traffic"]) == ("halted", "as it was")
    assert "live traffic" not in halt


def frozen(begins: float, ends: float) -> tuple[str, list[str]]:
    """When a freeze ends that comes so many seconds after the beginning, and the pages of the time that it costs."""
    world = World()
    start, stop = (datetime.fromtimestamp(world.clock.now() + each, UTC).isoformat() for each in (begins, ends))
    world = World(f"{POLICY}governance: {{freeze: [{{from: '{start}', to: '{stop}'}}]}}\n")
    end = moment(world.clock.now() + ends)
    world.drive()
    return end, [shown(each) for each in world.seen if each.state.frozen is not None]


def test_a_freeze_is_told_with_its_end() -> None:
    end, told = frozen(5.0, 300.0)
    held = next(page for page in told if "**PASS**" in page)
    assert held.count(end) == 2, "nothing new before, the next stage from then on"
    assert "lockgate promote" not in held
    end, told = frozen(-5.0, 300.0)
    assert f"**Frozen.** Nothing new is let on before {end}; then it goes on by itself." in told[0]


def test_people_who_are_asked_and_a_pause_are_told_first() -> None:
    world = World(POLICY + "governance: {approvals: {by: [ann, ben], count: 2, wait: 60s}}\n")
    asked = next(text for text in pages(world) if "waiting for approval" in text.splitlines()[0])
    assert "**People are asked.** It needs the approval of 2 of ann, ben" in asked
    assert "Without an answer by" in asked
    world = World(POLICY + "  pause_max: 30s\n")
    controller = world.controller(world.request())

    def alarm() -> None:
        if world.seen and world.seen[-1].state.label == "canary 20 %" and world.seen[-1].state.in_force:
            world.clock.alarms.remove(alarm)
            order(world.ports, "r1", "ann", "pause", "a look at it", "ann")

    world.clock.alarms.append(alarm)
    controller.drive()
    paused = next(each for each in world.seen if each.state.paused_at is not None)
    assert "**Paused**: pause ordered: a look at it" in shown(paused)


def test_the_stages_are_those_that_were_and_those_to_come() -> None:
    world = World()
    world.drive()
    entries = world.ledger.read("r1")
    told = stages(entries)
    assert [line["stage"] for line in told] == [
        "pending", "shadow 100 %", "canary 20 %", "canary 50 %", "promoting", "watching", "promoted",
    ]  # fmt: skip
    assert [line["traffic"] for line in told] == ["0 %", "0 %", "20 %", "50 %", "100 %", "100 %", "100 %"]
    assert all(line["looks"] > 0 and line["verdict"] == "pass" for line in told[1:4])
    in_shadow = next(number for number, entry in enumerate(entries, 1) if entry.kind == "looked")
    early = stages(entries[:in_shadow])
    assert [(line["stage"], line["says"]) for line in early[2:]] == [
        ("canary 20 %", "to come"),
        ("canary 50 %", "to come"),
    ]


def test_no_name_and_no_reason_breaks_the_page() -> None:
    odd = "a|b\n# c <script>`x`"
    assert text(odd) == "a\\|b \\# c &lt;script&gt;\\`x\\`"
    assert table(["h"], [[text(odd)]]).count("\n") == 2


@pytest.mark.parametrize("other", ["Flight-Delay", "flight_delay", "flight delay", "模型", "-", "flight-delay-"])
def test_no_two_models_share_an_artifact(other: str) -> None:
    key = artifact_key(other, "rollout")
    assert key != artifact_key("flight-delay", "rollout") == "flight-delay-rollout"
    assert key.replace("-", "").isalnum()
    assert key.isascii()
    assert key == key.lower().strip("-")
