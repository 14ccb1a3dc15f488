"""What a process says of itself reaches its log, whatever is in it."""

from __future__ import annotations

import pytest

from serving.log import complain, say


def test_a_line_holds_what_no_encoding_has(capfd: pytest.CaptureFixture[str]) -> None:
    """A path of bytes that are no UTF-8, in an error's text: the handler that tells of it must not raise."""
    say("listening on caf\udce9\n")
    complain("No space left on device: 'caf\udce9'")
    assert capfd.readouterr() == ("listening on caf\\udce9\n", "No space left on device: 'caf\\udce9'\n")
