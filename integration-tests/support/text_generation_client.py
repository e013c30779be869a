"""PyPI's `text-generation` 0.7.0 against a running server: sync, async, streamed, details, errors.

It needs a huggingface_hub of before 1.0, so it has an environment of its own:

    python -m venv somewhere && somewhere/bin/pip install text-generation==0.7.0 pytest
    somewhere/bin/python integration-tests/support/text_generation_client.py http://127.0.0.1:3000 [KEY]
"""

import asyncio
import sys

import pytest
from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError


def main(url: str, key: str | None) -> None:
    """Raises AssertionError where an answer is not what the client's own types say."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    client = Client(url, headers=headers)
    whole = client.generate("In the beginning", max_new_tokens=8, decoder_input_details=True, top_n_tokens=2)
    assert whole.details is not None
    assert len(whole.details.tokens) == whole.details.generated_tokens == 8
    assert len(whole.details.prefill) > 1
    events = list(client.generate_stream("In the beginning", max_new_tokens=8))
    assert "".join(event.token.text for event in events) == whole.generated_text == events[-1].generated_text
    best = client.generate("In the", max_new_tokens=4, best_of=2, do_sample=True)
    assert best.details is not None
    assert len(best.details.best_of_sequences or []) == 1
    chat = client.chat([{"role": "user", "content": "Hi"}], max_tokens=4)
    assert chat.choices[0].message.role == "assistant"
    # Its chat streams cannot be read from TGI 3.3 either: it takes `[DONE]` for JSON, and wants a role in every chunk.
    with pytest.raises(ValidationError, match="max_new_tokens"):
        client.generate("a", max_new_tokens=10**6)

    async def several() -> list[str]:
        asynchronous = AsyncClient(url, headers=headers)
        answers = await asyncio.gather(*[asynchronous.generate("In the", max_new_tokens=4) for _ in range(4)])
        streamed = [event.token.text async for event in asynchronous.generate_stream("In the", max_new_tokens=4)]
        assert "".join(streamed) == answers[0].generated_text
        return [answer.generated_text for answer in answers]

    assert len(set(asyncio.run(several()))) == 1
    print("text-generation: everything as its types say")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
