"""The texts that the router's test of chat templates expects are those of transformers, as it is installed."""

import json

from support.chat_templates import RENDERED, render_all


def test_the_recorded_prompts_are_what_transformers_renders() -> None:
    recorded = json.loads(RENDERED.read_text())
    assert len(recorded) >= 40
    assert recorded == render_all()
