"""Corolla: prompt-tune and chat with a language model whose blocks run on a swarm of machines.

Invariant: these are the public names; importing them costs nothing until one is used.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import TYPE_CHECKING, Any

from corolla.errors import (
    BundleError,
    CheckpointError,
    CorollaError,
    DataError,
    LyingServer,
    MissingBlocks,
    NonFiniteLoss,
    NotAdmitted,
    OutOfOrder,
    PeerDisconnected,
    PeerSilent,
    PeerUnreachable,
    ProtocolError,
    RemoteError,
    RequestRefused,
    SessionLimit,
    SwarmUnavailable,
    TranscriptError,
    UnexpectedArgument,
    UnknownModel,
    UnsupportedFamily,
    UsageError,
)
from corolla.version import __version__

if TYPE_CHECKING:
    from corolla.chat.engine import ChatEngine
    from corolla.chat.sampling import SamplingSettings
    from corolla.chat.transcript import Transcript
    from corolla.client.model.causal_lm import (
        AutoDistributedModel,
        AutoDistributedModelForCausalLM,
        AutoDistributedModelForSequenceClassification,
    )
    from corolla.client.model.loading import load_tokenizer
    from corolla.client.sessions.session import InferenceSession
    from corolla.data.conversation import Conversation, Turn
    from corolla.data.documents import Document, read_documents
    from corolla.data.render import Renderer, RenderSettings
    from corolla.data.replies import Beginnings
    from corolla.data.sources import LoadReport, load_conversations
    from corolla.models.limits import context_limit
    from corolla.models.prompts import KeyValuePrefix, SoftPrompt
    from corolla.tuning.batches import Prepared, prepare
    from corolla.tuning.bundle import Bundle, load_bundle
    from corolla.tuning.described import ModelInfo
    from corolla.tuning.evaluate import Evaluation
    from corolla.tuning.settings import StudySettings, TuneSettings
    from corolla.tuning.study import study
    from corolla.tuning.tune import TuneResult, TuneStopped, tune

__all__ = [
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "Beginnings",
    "Bundle",
    "BundleError",
    "ChatEngine",
    "CheckpointError",
    "Conversation",
    "CorollaError",
    "DataError",
    "Document",
    "Evaluation",
    "InferenceSession",
    "KeyValuePrefix",
    "LoadReport",
    "LyingServer",
    "MissingBlocks",
    "ModelInfo",
    "NonFiniteLoss",
    "NotAdmitted",
    "OutOfOrder",
    "PeerDisconnected",
    "PeerSilent",
    "PeerUnreachable",
    "Prepared",
    "ProtocolError",
    "RemoteError",
    "RenderSettings",
    "Renderer",
    "RequestRefused",
    "SamplingSettings",
    "SessionLimit",
    "SoftPrompt",
    "StudySettings",
    "SwarmUnavailable",
    "Transcript",
    "TranscriptError",
    "TuneResult",
    "TuneSettings",
    "TuneStopped",
    "Turn",
    "UnexpectedArgument",
    "UnknownModel",
    "UnsupportedFamily",
    "UsageError",
    "__version__",
    "context_limit",
    "load_bundle",
    "load_conversations",
    "load_tokenizer",
    "prepare",
    "read_documents",
    "study",
    "tune",
]

# Modules that are imported when one of their names is first used.
_HOMES = {
    "AutoDistributedModel": "client.model.causal_lm",
    "AutoDistributedModelForCausalLM": "client.model.causal_lm",
    "AutoDistributedModelForSequenceClassification": "client.model.causal_lm",
    "Beginnings": "data.replies",
    "Bundle": "tuning.bundle",
    "ChatEngine": "chat.engine",
    "Conversation": "data.conversation",
    "Document": "data.documents",
    "Evaluation": "tuning.evaluate",
    "InferenceSession": "client.sessions.session",
    "KeyValuePrefix": "models.prompts",
    "LoadReport": "data.sources",
    "ModelInfo": "tuning.described",
    "Prepared": "tuning.batches",
    "RenderSettings": "data.render",
    "Renderer": "data.render",
    "SamplingSettings": "chat.sampling",
    "SoftPrompt": "models.prompts",
    "StudySettings": "tuning.settings",
    "Transcript": "chat.transcript",
    "TuneResult": "tuning.tune",
    "TuneSettings": "tuning.settings",
    "TuneStopped": "tuning.tune",
    "Turn": "data.conversation",
    "context_limit": "models.limits",
    "load_bundle": "tuning.bundle",
    "load_conversations": "data.sources",
    "load_tokenizer": "client.model.loading",
    "prepare": "tuning.batches",
    "read_documents": "data.documents",
    "study": "tuning.study",
    "tune": "tuning.tune",
}


def __getattr__(name: str) -> Any:
    """Names of `_HOMES`, and `DistributedLlamaForCausalLM` and its siblings, which are made when first used."""
    if name in _HOMES:
        return getattr(import_module(f"corolla.{_HOMES[name]}"), name)
    family = re.fullmatch(r"Distributed(\w+(?:ForCausalLM|ForSequenceClassification|Model))", name)
    if family is not None:
        from corolla.client.model.causal_lm import distributed_named

        try:
            return distributed_named(family[1])
        except UnsupportedFamily as error:
            raise AttributeError(str(error)) from error
    raise AttributeError(f"module 'corolla' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
