"""What transformers renders for every template and chat of `router/tests/chat_templates/`.

The router's own test compares with `rendered.json`, which this writes:
`python integration-tests/support/chat_templates.py`.
"""

import json
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

FOLDER = Path(__file__).resolve().parents[2] / "router" / "tests" / "chat_templates"
RENDERED = FOLDER / "rendered.json"
# Given to every template, as a tokenizer gives its special tokens.
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "date_string": "26 Jul 2024"}


def render(template: str, chat: dict[str, Any]) -> str | None:
    """The prompt; None if the template refuses the chat, or cannot be rendered for it."""
    try:
        rendered, _ = render_jinja_template(
            [chat["messages"]],
            tools=chat.get("tools"),
            chat_template=template,
            add_generation_prompt=chat.get("add_generation_prompt", False),
            continue_final_message=chat.get("continue_final_message", False),
            **VARIABLES,
            **chat.get("variables", {}),
        )
    except (TemplateError, TypeError, ValueError):
        return None
    text: str = rendered[0]
    return text


def render_all() -> dict[str, dict[str, str | None]]:
    """By template, then by chat."""
    chats = json.loads((FOLDER / "chats.json").read_text())
    templates = {path.stem: path.read_bytes().decode() for path in sorted(FOLDER.glob("*.jinja"))}
    return {
        name: {title: render(template, chat) for title, chat in chats.items()} for name, template in templates.items()
    }


if __name__ == "__main__":
    RENDERED.write_text(json.dumps(render_all(), ensure_ascii=False, indent=1) + "\n")
