"""The tokenizer of the shipped LLM, with only the words of the quickstart's world."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from visper.quickstart.language import COLUMNS, DEPTHS, ROWS
from visper.quickstart.questions import PLURALS
from visper.quickstart.scenes import COLORS, SHAPES

SPECIAL = ("<pad>", "<unk>", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
PHRASES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
NUMBERS = ("0", "1", "2", "3", "4", "5", "6")
WORDS = (
    *COLORS,
    *SHAPES,
    *PLURALS.values(),
    *COLUMNS,
    *ROWS,
    *DEPTHS,
    *NUMBERS,
    "A",
    "B",
    "left",
    "right",
    "above",
    "below",
    ".",
    ",",
    ":",
    "?",
    "a",
    "the",
    "and",
    "at",
    "or",
    "is",
    "are",
    "it",
    "to",
    "from",
    "of",
    "in",
    "there",
    "nothing",
    "ground",
    "part",
    "How",
    "many",
    "Which",
    "closer",
    "camera",
    "Where",
    "seen",
    "What",
    "Describe",
    "picture",
    "Find",
    "things",
    "You",
    "see",
    "one",
    "Answer",
    "questions",
    "about",
    "with",
    "words",
    "few",
)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant, found ' + message['role']) }}"
    "{% endif %}"
    "{{ ' <|' + message['role'] + '|> ' + message['content'] | trim + ' <|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <|assistant|> ' }}{% endif %}"
)
SYSTEM_PROMPT = "Answer questions about the picture with few words ."


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer. Texts are words separated by spaces; each object name is one token."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    inner.add_tokens([AddedToken(name, single_word=True, normalized=False) for name in PHRASES])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=1024,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
