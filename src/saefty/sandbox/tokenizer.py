"""The sandbox's tokenizer: every word one token, `<bos>` once in front, and a chat template."""

from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from saefty.sandbox.lexicon import LANGUAGES
from saefty.sandbox.world import World

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
ROLE_TOKENS = {"system": "<system>", "user": "<user>"}

# The answer follows the request without a mark of its own, so the request's last word is where the
# answer is decided: an ordinary word, which SAEs are trained on and interventions act at.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' ' + eos_token + ' ' }}{% endgeneration %}"
    "{% elif message['role'] in ('system', 'user') %}"
    "{{ '<' + message['role'] + '> ' + message['content'] + ' ' }}"
    "{% else %}"
    "{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
)


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a world: its vocabulary is every word the world can say."""
    words = sorted(set().union(*(world.grammar.vocabulary(language) for language in LANGUAGES)))
    return word_tokenizer(
        [*world.grammar.shared, *words], list(ROLE_TOKENS.values()), CHAT_TEMPLATE
    )


def word_tokenizer(
    words: Sequence[str], specials: Sequence[str], template: str
) -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows some words, each a token.

    Args:
        words: The words, in the order of their ids.
        specials: Special tokens beside those of every tokenizer; their ids come before the words'.
        template: The chat template.
    """
    listed = [PAD, BOS, EOS, UNK, *specials, *words]
    vocabulary = {text: n for n, text in enumerate(listed)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, vocabulary[BOS])],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=list(specials),
        clean_up_tokenization_spaces=False,
        model_max_length=128,
        padding_side="right",
    )
    tokenizer.chat_template = template
    return tokenizer
