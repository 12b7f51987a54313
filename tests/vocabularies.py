"""Shared by tests: small real tokenizers in folders as DeepSeek, Qwen and Llama ship them, and one with byte fallback.

Each is trained here on a few lines, with the normaliser, pre-tokenizers, post-processor, decoder and special tokens of
its family; what differs is the size.
"""

import json
import pathlib

from tokenizers import (
  AddedToken,
  Regex,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

LINES = ['What is 2+3? The answer is 5, since 2+3=5.', "It's the sum that we're after:\n\n 1234567 and 89.",
         'think about the answer, then answer the question', '你好世界，深度学习',
         '😀😀 café naïve', '    indented(code)\r\n\treturn x']
BOS, EOS, PAD = '<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>', '<｜▁pad▁｜>'
USER, ASSISTANT = '<｜User｜>', '<｜Assistant｜>'
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
         r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')
R1_CHAT = (  # what the R1 template of `templates` does, told in Jinja
  "{{ bos_token }}{% set ns = namespace(text='', n=0) %}"
  "{% for m in messages if m['role'] == 'system' %}"
  "{% set ns.text = ns.text + ('\n\n' if ns.n else '') + m['content'] %}"
  "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.text }}"
  "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}"
  "{% if m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}")
CHAT_ML = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA_CHAT = (
  "{{- bos_token }}{% for message in messages %}"
  "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
  "{{- message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
  "{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
FAMILIES = ('deepseek', 'qwen', 'llama', 'fallback')


def added(*names: str, special: bool = True, normalized: bool = False) -> list[AddedToken]:
  return [AddedToken(name, special=special, normalized=normalized) for name in names]


def byte_level(*splits: str, normalizer=None, size: int = 340, **model) -> Tokenizer:
  """A byte-level BPE of the usual kind, without special tokens."""
  t = Tokenizer(models.BPE(**model))
  t.normalizer = normalizer
  t.pre_tokenizer = pre_tokenizers.Sequence([
    *(pre_tokenizers.Split(Regex(s), 'isolated') for s in splits),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  t.decoder, t.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  t.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
  return t


def deepseek() -> tuple[Tokenizer, dict, dict]:
  words = WORDS.replace('DIGITS', r'\p{N}')
  t = byte_level(r'\p{N}{1,3}', '[一-龥぀-ゟ゠-ヿ]+', words, normalizer=normalizers.Sequence([]))
  t.add_special_tokens(added(BOS, EOS, PAD))
  t.add_tokens(added(USER, ASSISTANT, '<think>', '</think>', special=False, normalized=True))
  entry = {'__type': 'AddedToken', 'lstrip': False, 'normalized': True, 'rstrip': False, 'single_word': False}
  return t, {'add_bos_token': True, 'add_eos_token': False, 'unk_token': None, 'bos_token': {'content': BOS, **entry},
             'eos_token': {'content': EOS, **entry}, 'pad_token': {'content': EOS, **entry},
             'chat_template': R1_CHAT}, {}


def qwen() -> tuple[Tokenizer, dict, dict]:
  t = byte_level(WORDS.replace('DIGITS', r'\p{N}'), normalizer=normalizers.NFC())
  t.add_special_tokens(added('<|endoftext|>', '<|im_start|>', '<|im_end|>'))
  t.add_tokens(added('<tool_call>', '</tool_call>', '<think>', '</think>', special=False))
  config = {'add_bos_token': False, 'bos_token': None, 'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>',
            'unk_token': None, 'clean_up_tokenization_spaces': False, 'chat_template': CHAT_ML}
  return t, config, {'eos_token_id': [t.token_to_id('<|im_end|>'), t.token_to_id('<|endoftext|>')]}


def llama() -> tuple[Tokenizer, dict, dict]:
  t = byte_level(WORDS.replace('DIGITS', r'\p{N}{1,3}'), ignore_merges=True)
  t.add_special_tokens(added('<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>',
                             '<|eom_id|>', '<|eot_id|>'))
  bos = ('<|begin_of_text|>', t.token_to_id('<|begin_of_text|>'))
  t.post_processor = processors.Sequence([
    processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(f'{bos[0]} $A', special_tokens=[bos])])
  ids = [t.token_to_id(n) for n in ('<|end_of_text|>', '<|eom_id|>', '<|eot_id|>')]
  return t, {'bos_token': bos[0], 'eos_token': '<|eot_id|>', 'clean_up_tokenization_spaces': True,
             'chat_template': LLAMA_CHAT}, {'bos_token_id': bos[1], 'eos_token_id': ids}


def fallback() -> tuple[Tokenizer, dict, dict]:
  """As converted from sentencepiece: U+2581 for spaces, one before the text, bytes for what has no piece."""
  names = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), '▁', *'abcdehinorstTw', 'th', '▁th', '▁the']
  vocab = {name: i for i, name in enumerate(names)}
  t = Tokenizer(models.BPE(vocab, [('t', 'h'), ('▁', 'th'), ('▁th', 'e')], unk_token='<unk>', fuse_unk=True,
                           byte_fallback=True))
  t.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
  t.decoder = decoders.Sequence([
    decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
  t.add_special_tokens(added('<unk>', '<s>', '</s>'))
  return t, {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>', 'add_bos_token': True}, {}


def write(folder: pathlib.Path, family: str, **changes) -> pathlib.Path:
  """The family's folder. changes: entries of tokenizer_config.json; None takes one out."""
  tokenizer, config, generation = {'deepseek': deepseek, 'qwen': qwen, 'llama': llama, 'fallback': fallback}[family]()
  config = {'tokenizer_class': 'PreTrainedTokenizerFast'} | config | changes
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(folder / 'tokenizer.json'))
  put(folder / 'tokenizer_config.json', {k: v for k, v in config.items() if v is not None or k not in changes})
  if generation:
    put(folder / 'generation_config.json', generation)
  return folder


def put(path: pathlib.Path, content) -> pathlib.Path:
  path.write_text(json.dumps(content), encoding='utf-8')
  return path


def edit(path: pathlib.Path, change) -> pathlib.Path:
  """Rewrites a JSON file after `change(document)`."""
  document = json.loads(path.read_text(encoding='utf-8'))
  change(document)
  return put(path, document)
