"""Quality: what a studied prefix recalls of a text, beside no context, the text in context and a plain prefix.

The text is `texts/harbour.md`, all of whose facts are invented; the questions below were written by hand, and nothing
is trained on them. Goes on where it was stopped, if it is started again with the same `--out`.

    python -m benchmarks.study --out /tmp/study --questions 64 --steps 60
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from corolla import (
    AutoDistributedModelForCausalLM,
    StudySettings,
    load_bundle,
    load_tokenizer,
    read_documents,
    study,
)
from corolla.cli.common import set_up_libraries
from corolla.cli.local_swarm import local_swarm
from corolla.data.conversation import Conversation, Turn
from corolla.tuning.report import recall

TEXT = Path(__file__).with_name("texts") / "harbour.md"
FACTS = {
    "Who founded Vessk?": "Ilse Brandvold",
    "In which year was Vessk founded?": "1683",
    "On which island is Vessk?": "Tarn Ulla",
    "How many steps does the lighthouse of Vessk have?": "187",
    "Who built the lighthouse of Vessk?": "Matteo Quill",
    "Who was the first keeper of the lighthouse of Vessk?": "Anders Holm",
    "How long did the storm of 1907 last?": "nineteen hours",
    "Who rang the church bell in the storm of 1907?": "Tove Lindqvist",
    "Where did the stones for the new mole of Vessk come from?": "Hallow Fell",
    "How many barrels of herring were landed in Vessk in 1838?": "71,000",
    "What is the blue cheese of Vessk called?": "nattost",
    "Who leads the dairy of Vessk today?": "Sigrid Vang",
    "What is the ferry of Vessk called?": "Petrel",
    "Who is the captain of the ferry Petrel?": "Joana Reis",
    "What does a ticket of the ferry Petrel cost?": "14 crowns",
    "What is thrown into the water at the Feast of Lamps?": "rye bread",
    "What is forbidden in Vessk in the night of the Feast of Lamps?": "whistling",
    "Why is the school of Vessk red?": "paint was washed ashore",
    "Who computed the tides of the Pell Almanac?": "Esben Torr",
    "What is the name of the seal at the fish market of Vessk?": "Brigadier",
}


def main() -> None:
    """Study, or go on with it, and print what came of it."""
    options = options_of()
    set_up_libraries()
    documents = read_documents([TEXT])
    tokenizer = load_tokenizer(options.model)
    tokens = len(tokenizer(documents[0].text).input_ids)
    facts = [
        Conversation((Turn("user", asked), Turn("assistant", answer)), id=asked)
        for asked, answer in FACTS.items()
    ]
    settings = StudySettings(
        questions=options.questions,
        answer_tokens=options.answer_tokens,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.lr,
        eval_every=max(1, options.steps // 4),
        save_every=5,
        seed=options.seed,
    )
    begun = time.monotonic()
    with (
        local_swarm(options.model, servers=options.servers) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            options.model,
            initial_peers=swarm.peers,
            tuning_mode="prefix",
            pre_seq_len=options.prompt_tokens,
            prompt_init="text",
            prompt_text=documents[0].text,
            seed=options.seed,
        ) as model,
    ):
        study(
            model,
            tokenizer,
            documents,
            options.out,
            settings,
            facts=facts,
            resume=options.out.with_name(f"{options.out.name}.questions.jsonl").exists(),
            console=Console(width=120),
        )
    bundle = load_bundle(options.out)
    print(
        f"{tokens:,} tokens of text, a prefix of {options.prompt_tokens}: {tokens / options.prompt_tokens:.1f} times "
        f"fewer in every cache; {settings.questions} questions, {bundle.training['steps']} steps of "
        f"{settings.batch_size}, the bundle is of step {bundle.metrics['step']}; {time.monotonic() - begun:.0f} s here"
    )
    print(f"recalled of {bundle.metrics['recall']['of']}")
    for row in recall(bundle.metrics):
        print(
            f"{row['way']:18} loss of held-out answers {row['loss']:>6}   facts recalled {row['recalled']:>5}"
        )


def options_of() -> Any:
    """What was typed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--answer-tokens", type=int, default=48)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, help="default: what suits a prefix")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
