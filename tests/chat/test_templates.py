"""A chat with SentencePiece's kind of tokens feeds what its template makes of the conversation."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.data.kinds_of_tokenizers import tokenizer_of
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny

from corolla.chat.engine import ChatEngine
from corolla.chat.sampling import SamplingSettings
from corolla.data.render import Renderer, RenderSettings


@pytest.mark.parametrize("marked", [True, False], ids=["marks are tokens", "marks are text"])
def test_what_is_fed_is_the_templates(tmp_path: Path, marked: bool) -> None:
    tokenizer = tokenizer_of("metaspace always", "chatml", marked=marked)
    folder = write_tiny("llama", tmp_path, vocab_size=len(tokenizer))
    renderer = Renderer(tokenizer, RenderSettings(style="template"))
    with MemorySwarm(folder, [(0, 2), (2, 4)]) as swarm, swarm.model() as model:
        model.generation_config.eos_token_id = None
        greedy = SamplingSettings(temperature=0, max_new_tokens=8)
        with ChatEngine(model, renderer, sampling=greedy, max_context=400) as engine:
            messages: list[dict[str, str]] = []
            told: list[int] = []
            for said in ("Hi there", "a\nb", "Where do you live?"):
                held = engine.tokens
                reply = "".join(engine.reply(said))
                session = engine._session.output_ids[0].tolist()
                messages.append({"role": "user", "content": said})
                prompt = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=False
                )
                # What this turn has added is what the template adds.
                assert session[len(held) :][: len(prompt) - len(told)] == prompt[len(told) :]
                assert session[: len(held)] == held
                messages.append({"role": "assistant", "content": reply})
                told = list(tokenizer.apply_chat_template(messages, return_dict=False))
                assert engine.tokens[-len(renderer.closing_ids) :] == renderer.closing_ids
