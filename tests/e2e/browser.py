"""A person before the Prefect UI: a headless Chromium, whose pictures stay in `build/screenshots`."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.needs import lacking

PICTURES = Path(__file__).resolve().parents[2] / "build" / "screenshots"
_WAIT_S = 60.0  # a page of a busy machine


def programs_or_skip() -> tuple[str, str]:
    """Chromium and its driver, or the test is skipped; in CI it fails, for there they are installed."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        lacking("Chromium with its driver", "chromium-driver")
    return browser, driver


@contextmanager
def browser() -> Iterator[Browser]:
    """Closed afterwards, with all its processes."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    program, driver = programs_or_skip()
    options = ChromeOptions()
    options.binary_location = program
    for each in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1500,1400"):
        options.add_argument(each)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium has none for root
    chrome = Chrome(options=options, service=Service(driver))
    try:
        yield Browser(chrome)
    finally:
        chrome.quit()


@dataclass
class Browser:
    """What a person does with it: opens a page, reads, clicks, types."""

    chrome: Any

    def opens(self, url: str, *expected: str) -> None:
        """The page, once it says all that is expected."""
        self.chrome.get(url)
        self.reads(*expected)

    def reads(self, *expected: str) -> None:
        """Waits until the page says all of it."""
        deadline = time.monotonic() + _WAIT_S
        while missing := [each for each in expected if each not in self.says()]:
            assert time.monotonic() < deadline, f"{self.chrome.current_url} does not say {missing}: {self.says()}"
            time.sleep(0.2)

    def says(self) -> str:
        return str(self.chrome.execute_script("return document.body.innerText"))

    def clicks(self, label: str, within: str = "body") -> None:
        """With the mouse, on the button or tab of that label."""
        what = f"//*[self::button or @role='tab' or contains(@class, 'p-tab')][normalize-space()='{label}']"
        self._can(lambda: self._one(within).find_element("xpath", f".{what}").click(), f"click {label}")

    def chooses(self, number: int, option: str) -> None:
        """In the form's so-many-th list."""
        from selenium.webdriver.support.ui import Select

        self._can(lambda: Select(self._shown("select")[number]).select_by_visible_text(option), f"choose {option}")

    def types(self, number: int, words: str) -> None:
        """Into the form's so-many-th field."""
        self._can(lambda: self._shown("textarea")[number].send_keys(words), f"type {words}")

    def keeps(self, name: str) -> Path:
        """The picture of what is seen."""
        PICTURES.mkdir(parents=True, exist_ok=True)
        path = PICTURES / f"{name}.png"
        assert self.chrome.save_screenshot(str(path))
        return path

    def _one(self, css: str) -> Any:
        return self.chrome.find_element("css selector", css)

    def _shown(self, css: str) -> list[Any]:
        found = self._one("[role=dialog]").find_elements("css selector", css)
        return [each for each in found if each.is_displayed()]

    def _can(self, act: Any, what: str) -> None:
        """Tried until the page is so far."""
        from selenium.common.exceptions import WebDriverException

        deadline = time.monotonic() + _WAIT_S
        while True:
            try:
                return act()
            except (WebDriverException, IndexError) as exc:  # it is drawn anew, or not there yet
                if time.monotonic() >= deadline:
                    raise AssertionError(f"{self.chrome.current_url}: cannot {what}") from exc
                time.sleep(0.2)
