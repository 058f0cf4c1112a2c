"""From MMLU's questions to rows of tokens, each with the four answers that are compared after it.

Text and tokens are lm-evaluation-harness's (task `mmlu`, version 2 of the group): a line about the subject, the shots
with their answers, the question with `Answer:`, and the answers " A" to " D". Prompt and answer are tokenized together
and cut where the prompt's own tokens end; what the tokenizer puts before a text, such as BOS, stays.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lorasp.data.mmlu import LETTERS, MmluData, Question, Subject
from lorasp.evaluation.scoring import Forward, Part, ScoredRow
from lorasp.models.kept_states import Link
from lorasp.recipe import Mmlu, RecipeError

PROMPT_VERSION = "lm-evaluation-harness mmlu 2"
_DEFAULT_MAX_LENGTH = 2048  # the harness's, of models that do not tell

# (five shots, a question) in tokens: of the longest subject, and of the longest of those that meet it in a forward.
# SmolLM2's tokenizer makes 2,495 + 652 and 839 + 422 of them; there are tokenizers that make a tenth more.
_LONGEST = ((2750, 750), (925, 475))


@dataclass(frozen=True)
class PromptedQuestion:
    """A question as the model sees it.

    rows: what is computed; one, unless the answers differ before their last token. letters: for each row, which
    answers its continuations are (0 to 3). shots: how many stand before it. tokens: of prompt and answer before any
    truncation; lost: those cut from the left.
    """

    subject: str
    index: int
    answer: int
    rows: tuple[ScoredRow, ...]
    letters: tuple[tuple[int, ...], ...]
    shots: int
    tokens: int
    lost: int


def prompt(subject: Subject, shots: int, question: Question) -> str:
    """The text before the answer, with the first `shots` of the subject's shots."""
    about = subject.name.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    return head + "".join(f"{_asked(s)} {LETTERS[s.answer]}\n\n" for s in subject.shots[:shots]) + _asked(question)


def _asked(question: Question) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return f"{question.question.strip()}{choices}\nAnswer:"


def model_max_length(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
    """Tokens that the model takes, as the harness finds it."""
    config = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    told = getattr(tokenizer, "model_max_length", None)
    return int(told) if told and told < 10**18 else _DEFAULT_MAX_LENGTH  # unknown: transformers says 10**30


def assumed_forward(settings: Mmlu, config: PreTrainedConfig) -> tuple[Forward, list[ScoredRow]]:
    """About MMLU's heaviest forward, for who has neither its questions nor a tokenizer at hand.

    Two subjects meet in it: questions of the longest one's, that go on from its shots, after another one's shots.
    """
    limit = settings.max_length or model_max_length(config)
    asked = [min(question, limit) for _, question in _LONGEST]
    before = [min(shots * settings.shots // 5, limit - its) for (shots, _), its in zip(_LONGEST, asked, strict=True)]
    answers = tuple((letter,) for letter in range(len(LETTERS)))
    if not (settings.reuse_prefix and before[0]):
        whole = before[0] + asked[0]
        count = max(1, settings.tokens // whole)
        return Forward(tuple(Part(row, (0,) * whole) for row in range(count))), [ScoredRow((), answers)] * count
    parts = [
        Part(None, (0,) * shots, Link(key, keeps=True, room=shots + its))
        for key, (shots, its) in enumerate(zip(before, asked, strict=True))
    ]
    count = max(1, (settings.tokens - before[1]) // asked[0])
    parts += [Part(row, (0,) * asked[0], Link(0)) for row in range(count)]
    return Forward(tuple(parts), done=(0, 1)), [ScoredRow((), answers)] * count


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """As the harness tokenizes a text: with what the tokenizer puts before one, unless the text begins with it."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    begins = None if first is None else tokenizer.decode(first)
    if begins is not None and any(text.startswith(begins) for text in texts):
        return [
            tokenizer.encode(text, **({"add_special_tokens": False} if text.startswith(begins) else {}))
            for text in texts
        ]
    return tokenizer(list(texts), return_attention_mask=False)["input_ids"] if texts else []


def prompted_questions(
    data: MmluData, tokenizer: PreTrainedTokenizerBase, *, shots: int, max_length: int, truncate: str
) -> list[PromptedQuestion]:
    """The questions, subject by subject. `max_length`: tokens that the model is given at most.

    truncate: a prompt that is longer loses tokens from the left (`tokens`), or its last shots (`shots`), and tokens
    only where the question alone is too long. Raises RecipeError for a tokenizer with which an answer adds no token of
    its own to "Answer:".
    """
    questions = []
    for subject in data.subjects:
        tokenized = _tokenized(tokenizer, [prompt(subject, shots, question) for question in subject.questions])
        for index, (question, (context, answers)) in enumerate(zip(subject.questions, tokenized, strict=True)):
            whole, kept = _length(context, answers), shots
            while truncate == "shots" and kept and _length(context, answers) - 1 > max_length:
                kept -= 1
                [(context, answers)] = _tokenized(tokenizer, [prompt(subject, kept, question)])
            rows, letters, lost = _rows(context, answers, (subject.name, kept), max_length)
            questions.append(PromptedQuestion(subject.name, index, question.answer, rows, letters, kept, whole, lost))
    return questions


def _tokenized(tokenizer: PreTrainedTokenizerBase, contexts: list[str]) -> list[tuple[list[int], list[list[int]]]]:
    """Of each context its tokens, and those that follow them for each answer.

    With its first answer each context is tokenized, but only the first one, and those with which that answer has other
    tokens, also by itself and with the others: where a token begins with the answer, the text before it has the tokens
    that it has alone.
    """
    # A space at the context's end would go to the answer; there is none after "Answer:".
    found, usual = [], None
    for text, whole in zip(contexts, encode_texts(tokenizer, [f"{it} {LETTERS[0]}" for it in contexts]), strict=True):
        if usual is not None and whole[-len(usual[0]) :] == usual[0]:
            found.append((whole[: -len(usual[0])], usual))
            continue
        context, *others = encode_texts(tokenizer, [text, *(f"{text} {letter}" for letter in LETTERS[1:])])
        answers = [its[len(context) :] for its in (whole, *others)]
        if not all(answers):
            letter = LETTERS[next(i for i, answer in enumerate(answers) if not answer)]
            raise RecipeError(
                f"mmlu: this model's tokenizer joins {letter!r} with the text before it, so that the answer has no "
                f"token of its own and no log-likelihood; MMLU cannot be scored with it"
            )
        found.append((context, answers))
        if usual is None and whole[: len(context)] == context:
            usual = answers
    return found


def _length(context: list[int], answers: list[list[int]]) -> int:
    return len(context) + max(map(len, answers))


def _rows(
    context: list[int], answers: list[list[int]], family: tuple[str, int], max_length: int
) -> tuple[tuple[ScoredRow, ...], tuple[tuple[int, ...], ...], int]:
    """The rows of a question, the answers (0 to 3) that each compares, and how many tokens were lost."""
    by_beginning: dict[tuple[int, ...], list[int]] = {}
    for letter, answer in enumerate(answers):
        by_beginning.setdefault(tuple(answer[:-1]), []).append(letter)
    rows, lost = [], 0
    for beginning, letters in by_beginning.items():
        if len(beginning) >= max_length:
            raise RecipeError(f"mmlu.max_length: {max_length} tokens do not hold an answer of {len(beginning) + 1}")
        over = max(0, len(context) + len(beginning) - max_length)
        lost = max(lost, over)
        rows.append(
            ScoredRow(
                tokens=array("i", [*context, *beginning][over:]),
                continuations=tuple(tuple(answers[letter]) for letter in letters),
                family=None if over else family,  # what lost tokens begins like no other
            )
        )
    return tuple(rows), tuple(map(tuple, by_beginning.values())), lost
