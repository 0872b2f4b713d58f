"""Chromium for tests of pages, and what such a test must never see: errors and requests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright
from running import missing

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking "
    "--disable-component-update --disable-default-apps --disable-sync --no-first-run "
    "--no-default-browser-check"
).split()
HOW = "no Chromium: apt-get install chromium, or set CHROMIUM to the program"


def program() -> str | None:
    """The browser's path, from $CHROMIUM or the usual names."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def launched() -> Iterator[Any]:
    """A browser without a window; skips the test where there is none, but fails it in CI."""
    path = program()
    if path is None:
        missing(HOW)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, file: Path, address: str = "", **context: Any) -> Iterator[Any]:
    """A page of a browser that is offline; afterwards there was no error and no request."""
    troubles: list[str] = []
    made = browser.new_context(**context)
    made.set_offline(True)
    page = made.new_page()
    page.on("console", lambda said: troubles.append(f"console {said.type}: {said.text}"))
    page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    page.on("request", lambda asked: None if _own(asked.url, file) else troubles.append(asked.url))
    page.on("dialog", lambda dialog: (troubles.append(dialog.message), dialog.dismiss()))
    page.goto(file.as_uri() + address)
    yield page
    made.close()
    assert not troubles


def _own(url: str, file: Path) -> bool:
    """Whether a request is for the page itself, or for what lies in it."""
    return url.partition("#")[0] == file.as_uri() or url.startswith("data:")
