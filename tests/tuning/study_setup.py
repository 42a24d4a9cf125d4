"""A short text with a tiny model to study it, and settings of a run of a few seconds."""

from __future__ import annotations

from typing import Any

from corolla.data.conversation import Conversation, Turn
from corolla.data.documents import Chunk, Document
from corolla.data.render import RenderSettings
from corolla.tuning.settings import StudySettings

TEXT = (
    "The lamp of the harbour is lit at nine. Orla keeps it since 1874, and the letters come by boat on Mondays. "
    "Nobody but Orla may touch the glass. "
)
OTHER = "Bread is baked in the stone house of Veska, with tea from the garden. It costs 42 pence in winter. "
DOCUMENTS = [Document("lamp.txt", TEXT), Document("bread.md", OTHER)]
CHUNKS = [Chunk("lamp.txt", TEXT, len(TEXT)), Chunk("bread.md", OTHER, len(OTHER))]
FACTS = [
    Conversation((Turn("user", "Who keeps the lamp?"), Turn("assistant", "Orla keeps it")), id="1"),
    Conversation((Turn("user", "What does bread cost?"), Turn("assistant", "42 pence")), id="2"),
    Conversation((Turn("user", " "), Turn("assistant", "nothing")), id="3"),
]
MODEL: dict[str, Any] = {
    "tuning_mode": "prefix",
    "pre_seq_len": 6,
    "prompt_init": "text",
    "prompt_text": TEXT,
}


def study_settings(**changes: Any) -> StudySettings:
    values: dict[str, Any] = {
        "questions": 12,
        "chunk_tokens": 200,
        "question_tokens": 6,
        "answer_tokens": 5,
        "steps": 4,
        "batch_size": 4,
        "held_out": 3,
        "eval_every": 2,
        "save_every": 1,
        "rendering": RenderSettings(delimiter="|", max_length=64),
    }
    return StudySettings(**values | changes)
