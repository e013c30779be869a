"""The page at `/` in a headless Chromium: a prompt is typed, the stream is seen, probabilities are shown on hover.

Skipped where there is no Chromium (Debian: `apt install chromium`). `SCREENSHOT=docs/page.png` keeps what was seen.
"""

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import LLAMA
from support.browser import Page, find_chromium
from support.server import Server

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium on this machine; Debian, Ubuntu: apt install chromium"
)

STREAMED = "[...document.querySelectorAll('.assistant')].at(-1).textContent"


@pytest.fixture
def server() -> Iterator[Server]:
    """Of a model that is called as people call it: the page shows the name."""
    with Server(os.path.relpath(LLAMA), "--dtype", "float32") as server:
        yield server


def test_a_prompt_is_typed_and_its_stream_is_seen(server: Server) -> None:
    assert CHROMIUM is not None
    url = f"http://127.0.0.1:{server.port}/"
    prompt = {"inputs": "In the beginning", "parameters": {"max_new_tokens": 48}}
    status, expected = server.post("/generate", prompt)
    assert status == 200
    with Page(CHROMIUM, url) as page:
        page.open(url)
        page.wait_until("document.querySelectorAll('#gauges tr').length > 3")
        for mode in ("chat", "text"):
            page.evaluate(
                f"document.getElementById('mode-{mode}').click(); document.getElementById('max').value = 48;"
                " document.getElementById('temperature').value = 0"
            )
            page.evaluate("document.getElementById('prompt').focus()")
            page.write("In the beginning")
            page.press_enter()
            page.wait_until("document.querySelectorAll('.assistant .token').length > 8")
            page.wait_until("document.getElementById('send').textContent === 'Send'")
            assert page.evaluate("[...document.querySelectorAll('.error')].map(e => e.textContent)") == []
        assert expected["generated_text"].strip() in page.evaluate(STREAMED)
        page.hover(".assistant .token")
        page.wait_until("document.getElementById('tip').style.display === 'block'")
        tip = page.evaluate("document.getElementById('tip').textContent")
        shares = [float(share) for share in re.findall(r"([\d.]+) %", tip)]
        assert len(shares) > 2, shares
        assert all(more >= less for more, less in itertools.pairwise(shares[1:])), "the most probable alternative first"
        if "SCREENSHOT" in os.environ:
            page.save_screenshot(Path(os.environ["SCREENSHOT"]))
        assert page.outside == [], "no asset is anybody else's"
        assert page.exceptions == []
