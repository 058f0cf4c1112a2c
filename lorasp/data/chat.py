"""Chats as the tokenizer's own template writes them, and which characters of that text the assistant writes.

A template that marks its assistant's part (`{% generation %}`) is taken at its word. For any other, the chat is
rendered up to each turn of the assistant with the template's generation prompt, and once more with that turn: what the
second has more than the first is the turn. That is right only if both are beginnings of the whole, and a template for
which they are not (one that rewrites earlier turns, such as those that drop past reasoning) is refused: its chats are
not what the model sees turn by turn.
"""

import re
from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lorasp.recipe import RecipeError

Message = dict[str, str]  # role, content
Span = tuple[int, int]  # of characters, half-open

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """The chat template of `tokenizer`. Raises RecipeError if it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise RecipeError(
                "the tokenizer has no chat template, which data with messages needs; use the tokenizer of the model's "
                "instruct variant, or put a chat_template.jinja into the model's directory"
            )
        self._tokenizer = tokenizer
        self._template = tokenizer.get_chat_template()
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = tuple(dict.fromkeys((*tokenizer.all_special_tokens, *added)))
        self._any_special = re.compile("|".join(map(re.escape, self._special)) or "(?!)")

    def spells_special_token(self, messages: Sequence[Message]) -> bool:
        """Whether a message's own text holds a special token, which could end its turn or begin another."""
        return any(self._any_special.search(message["content"]) for message in messages)

    def render(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """The text of a chat and the span of each turn of the assistant, its end-of-turn token included.

        White space that the template writes after that token belongs to no turn. A template without such a token has
        its whole turn trained. Raises RecipeError, without the chat's place, if the template cannot say.
        """
        if _MARKER.search(self._template):
            texts, spans = self._guarded(
                render_jinja_template,
                [messages],
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
            found = [(start, stop) for start, stop in spans[0] if start < stop]
            text = texts[0]
        else:
            text = self._text(messages)
            found = [
                self._span(text, messages, turn)
                for turn, message in enumerate(messages)
                if message["role"] == "assistant"
            ]
        if not found:
            raise RecipeError("the chat template marks nothing of it as the assistant's")
        return text, found

    def _span(self, text: str, messages: list[Message], turn: int) -> Span:
        before = self._text(messages[:turn], add_generation_prompt=True)
        through = text if turn == len(messages) - 1 else self._text(messages[: turn + 1])
        if not (text.startswith(through) and through.startswith(before)):
            raise RecipeError(
                f"the chat template writes the turns up to message {turn + 1} otherwise when others follow, or after "
                f"its generation prompt, so what the assistant wrote cannot be told; use a template that marks it by "
                f"{{% generation %}} … {{% endgeneration %}}, or that leaves earlier turns as they are"
            )
        end = through.rstrip()
        return len(before), len(end) if end.endswith(self._special) and len(end) > len(before) else len(through)

    def _text(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        return self._guarded(
            self._tokenizer.apply_chat_template,
            messages,
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def _guarded(self, render, *arguments, **options):
        try:
            return render(*arguments, **options)
        except (TemplateError, TypeError, ValueError) as error:  # the template's own words, or its mistakes
            raise RecipeError(f"the chat template refuses it ({error or type(error).__name__})") from error
