"""/tokenize, /detokenize and /version, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest

from dllmserve import __version__
from dllmserve.errors import TokenizerError
from dllmserve.server.common import (
    JsonRoute,
    OwnerOf,
    ServiceOf,
    errors,
    free_body,
    note_prompts,
)
from dllmserve.server.failures import ApiError
from dllmserve.server.fields import Body, Entries, Text, TokenIds, example, neutral
from dllmserve.server.openai import check_model
from dllmserve.server.openai_bodies import conversation_of, template_variables
from dllmserve.server.openai_messages import Messages
from dllmserve.server.tools import Tools, told_tools

router = APIRouter(tags=["operation"], route_class=JsonRoute)


class TokenizeRequest(Body):
    """Body of /tokenize: a prompt, or messages."""

    model_config = example(prompt="The president")

    model: Text | None = Field(default=None, description="Name of the model, or nothing.")
    prompt: Text | None = Field(default=None, description="A text.")
    messages: Messages | None = Field(default=None, description="A chat, with its template.")
    tools: Tools | None = Field(default=None, description="Of the chat.")
    chat_template_kwargs: Entries[Any] | None = Field(
        default=None, description="More that the chat template may read."
    )
    return_token_strs: bool | None = Field(default=None, description="Also the text of each.")
    add_special_tokens: neutral(True) = None  # type: ignore[valid-type]
    add_generation_prompt: neutral(True) = None  # type: ignore[valid-type]
    continue_final_message: neutral(False) = None  # type: ignore[valid-type]


class DetokenizeRequest(Body):
    """Body of /detokenize."""

    model_config = example(tokens=[1, 2, 3])

    model: Text | None = Field(default=None, description="Name of the model, or nothing.")
    tokens: TokenIds


class Tokenized(BaseModel):
    """Ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    """The text of ids."""

    prompt: str


class Version(BaseModel):
    """What serves here."""

    version: str


@router.post("/tokenize", response_model=Tokenized, responses=errors(404))
async def tokenize(
    body: TokenizeRequest, http: HttpRequest, service: ServiceOf, owner: OwnerOf
) -> Response:
    """Token ids of a text, or of a chat as the model reads it."""
    check_model(body.model, service)
    free_body(http)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "one of prompt and messages must be given", param="prompt")
    note_prompts(http, service, body.prompt or body.messages)
    if body.messages is not None:
        tools = None if body.tools is None else told_tools(tool.function for tool in body.tools)
        variables = template_variables(body.chat_template_kwargs)
        ids = await service.chat_ids(conversation_of(body.messages), owner, tools, variables)
    else:
        ids = await service.prompt_ids(body.prompt or "", owner=owner)
    tokenizer = service.llm.tokenizer
    strings = None
    if body.return_token_strs and tokenizer is not None:
        strings = [tokenizer.decode([id]) for id in ids]
    answer = {"count": len(ids), "max_model_len": service.llm.info.limits.max_model_len}
    return JSONResponse({**answer, "tokens": ids, "token_strs": strings})


@router.post("/detokenize", response_model=Detokenized, responses=errors(404))
async def detokenize(body: DetokenizeRequest, service: ServiceOf) -> Response:
    """The text of token ids, without special tokens."""
    check_model(body.model, service)
    service.require_engine()
    size, tokenizer = service.llm.info.spec.embedding_size, service.llm.tokenizer
    if tokenizer is None:
        raise TokenizerError("the checkpoint has no tokenizer")
    for id in body.tokens:
        if id >= size:
            raise ApiError(
                400,
                f"tokens has {id}, and the model's ids are 0 to {size - 1}",
                code="invalid_parameter",
                param="tokens",
            )
    return JSONResponse({"prompt": tokenizer.decode(body.tokens)})


@router.get("/version", response_model=Version, responses=errors(body=False))
async def version() -> dict[str, str]:
    """The version of dllmserve."""
    return {"version": __version__}
