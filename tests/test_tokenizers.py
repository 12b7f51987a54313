"""Tokenizers of released models: no text becomes a special token, special ids are the files', streams are whole."""

import io
import pathlib
import re
import shutil
import sys
import unicodedata

import hypothesis
import hypothesis.strategies as st
import pytest
import sentencepiece
import tokenizers
import vocabularies
from vocabularies import FAMILIES, edit, put, write

from moe_rl.data.hf_tokenizer import byte_of_character
from moe_rl.data.tokenizer import SentencePiece, StreamDecoder, load_tokenizer

quick = hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
every_family = pytest.mark.parametrize('family', FAMILIES)
PIECES = ['<think>', '</think>', '<tool_call>', '<|im_end|>', '<|eot_id|>', '<|endoftext|>', vocabularies.USER,
          vocabularies.ASSISTANT, vocabularies.EOS, '</s>', '<s>', '<0x41>', '<|im_', 'end|>', '😀',
          '👩\u200d👩\u200d👧', 'e\u0301', '深', ' ', '\n']
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(
  st.characters(exclude_categories=['Cs'], exclude_characters='\u2581'), max_size=8)), max_size=8).map(''.join)
IDS = st.lists(st.integers(-2, 400), max_size=40)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  return {family: write(tmp_path_factory.mktemp('tokenizers') / family, family) for family in FAMILIES}


@pytest.fixture(scope='module')
def known(folders):
  return {family: load_tokenizer(folder) for family, folder in folders.items()}


@pytest.fixture(scope='module')
def library(folders):
  return {family: tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json')) for family, folder in folders.items()}


@pytest.fixture(scope='module')
def sentencepieces(tmp_path_factory):
  """The tiny model's, and three as others train them: with bos, byte fallback, and spaces handled in every way."""
  folder, out = tmp_path_factory.mktemp('sentencepieces'), [load_tokenizer('tiny')]
  for n, options in enumerate([{}, dict(remove_extra_whitespaces=False), dict(
      remove_extra_whitespaces=False, add_dummy_prefix=False)]):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(vocabularies.LINES), model_writer=model, model_type='bpe', vocab_size=330,
      hard_vocab_limit=False, byte_fallback=True, minloglevel=2, **options)
    (folder / f'{n}.model').write_bytes(model.getvalue())
    out.append(load_tokenizer(folder / f'{n}.model'))
  return out


def streamed(tokenizer, ids) -> str:
  stream = StreamDecoder(tokenizer)
  return ''.join([*(stream.feed(i) for i in ids), stream.flush()])


# Text to ids and back.


def spoken(family: str, text: str) -> str:
  """What of a text the family keeps: Qwen's normalises it, byte fallback has U+2581 for the space."""
  text = unicodedata.normalize('NFC', text) if family == 'qwen' else text
  return text.replace('\u2581', ' ') if family in ('fallback', 'tiny') else text


@every_family
@quick
@hypothesis.given(text=TEXT)
def test_any_text_comes_back_and_none_of_it_is_a_special_token(known, family, text):
  t = known[family]
  ids = t.encode(text)
  assert t.decode(ids) == spoken(family, text)
  assert all(0 <= i < t.vocab_size for i in ids) and not set(ids) & set(t.special.values())


@every_family
@quick
@hypothesis.given(text=TEXT)
def test_ids_are_the_librarys_where_every_special_token_is_allowed(known, library, family, text):
  t, reference = known[family], library[family]
  assert t.encode(text, allow=t.special) == reference.encode(text, add_special_tokens=False).ids
  if not any(name in text for name in t.special):
    assert t.encode(text) == reference.encode(text, add_special_tokens=False).ids


@every_family
def test_every_id_has_the_librarys_text(known, library, family):
  t, reference = known[family], library[family]
  for i in range(t.vocab_size):
    # After a letter, as the library takes the first space of a text away where the family has byte fallback.
    first = t.encode('a')[-1]
    wanted = reference.decode([first, i], skip_special_tokens=False)
    assert t.decode([first, i]) == ('a' if i in t.silent else wanted)


def test_byte_level_letters_are_the_librarys():
  assert set(byte_of_character()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  assert sorted(byte_of_character().values()) == list(range(256))


@pytest.mark.parametrize('family', ['deepseek', 'qwen', 'llama'])
@quick
@hypothesis.given(ids=IDS)
def test_any_ids_decode_as_the_library_has_it_broken_bytes_included(known, library, family, ids):
  t = known[family]
  there = [i for i in ids if 0 <= i < t.vocab_size and i not in t.silent]
  assert t.decode(ids) == library[family].decode(there, skip_special_tokens=False)


def test_only_what_is_allowed_by_name_becomes_a_token(known):
  t = known['qwen']
  think, end = t.special['<think>'], t.special['<|im_end|>']
  text = 'a<think>b<|im_end|>'
  assert {think, end}.isdisjoint(t.encode(text))
  assert t.encode(text, allow=['<think>', '<answer>']) == [*t.encode('a'), think, *t.encode('b<|im_end|>')]
  assert t.encode(text, allow=t.special) == [*t.encode('a'), think, *t.encode('b'), end]
  tiny = load_tokenizer('tiny')
  assert tiny.eos_id not in tiny.encode('1<eos>') and tiny.encode('1<eos>', allow=['<eos>'])[1:] == [tiny.eos_id]


def test_a_word_that_the_vocabulary_has_whole_is_no_way_to_a_special_token(tmp_path):
  # A model that ignores merges takes such a word as it is, so that leaving it out of the added tokens is not enough.
  folder = write(tmp_path, 'llama')
  edit(folder / 'tokenizer.json', lambda d: d['model']['vocab'].update({'halt': 346}) or d['added_tokens'].append(
    {**d['added_tokens'][0], 'id': 346, 'content': 'halt'}))
  t, reference = load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  reference.encode_special_tokens = True
  assert reference.encode('halt', add_special_tokens=False).ids == [346]
  assert 346 not in t.encode('halt') and t.decode(t.encode('halt')) == 'halt'
  assert t.encode('halt', allow=['halt']) == [346]


@pytest.mark.parametrize('flag', ['lstrip', 'rstrip', 'single_word'])
def test_flags_of_added_tokens_mean_what_they_mean_to_the_library(tmp_path, flag):
  folder = write(tmp_path, 'qwen')
  edit(folder / 'tokenizer.json', lambda d: [t.update({flag: True}) for t in d['added_tokens']])
  t, reference = load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  for text in ('a <think> b', 'a<think>b', '  <think>\n\n<think> c', '<think>', ' <|im_end|><think>', '<think>b'):
    assert t.encode(text, allow=t.special) == reference.encode(text, add_special_tokens=False).ids, text


def test_dropout_cutting_and_padding_of_the_file_are_left_out(tmp_path, known):
  folder = write(tmp_path, 'qwen')
  cut = {'direction': 'Right', 'max_length': 3, 'strategy': 'LongestFirst', 'stride': 0}
  edit(folder / 'tokenizer.json', lambda d: d['model'].update(dropout=0.5) or d.update(truncation=cut))
  assert load_tokenizer(folder).encode(vocabularies.LINES[0]) == known['qwen'].encode(vocabularies.LINES[0])


# Streams.


@every_family
@quick
@hypothesis.given(ids=IDS)
def test_a_stream_of_any_ids_adds_up_to_their_text(known, family, ids):
  assert streamed(known[family], ids) == known[family].decode(ids)


@pytest.mark.parametrize('n', range(4))
@quick
@hypothesis.given(ids=IDS)
def test_sentencepieces_own_decoding_is_ours(sentencepieces, n, ids):
  t = sentencepieces[n]
  inside = [i for i in ids if 0 <= i < t.vocab_size]
  assert streamed(t, ids) == t.decode(ids) == t._sp.decode(inside)


@pytest.mark.parametrize('name', [*FAMILIES, 'tiny'])
@quick
@hypothesis.given(text=TEXT)
def test_a_stream_never_shows_half_a_character(known, name, text):
  t = load_tokenizer('tiny') if name == 'tiny' else known[name]
  text = spoken(name, text)
  stream, shown = StreamDecoder(t), ''
  for i in t.encode(text):
    shown += stream.feed(i)
    assert text.startswith(shown)
  assert shown == text and stream.flush() == ''


@pytest.mark.parametrize('name', [*FAMILIES, 'tiny'])
def test_a_character_comes_with_its_last_byte_and_a_broken_one_at_the_end(known, name):
  t = load_tokenizer('tiny') if name == 'tiny' else known[name]
  ids = t.encode('a✏')  # three bytes, of which no vocabulary here has two together
  stream = StreamDecoder(t)
  shown = [stream.feed(i) for i in ids]
  assert ''.join(shown[:-3]) == 'a' and shown[-3:] == ['', '', '✏']
  stream = StreamDecoder(t)
  assert ''.join(map(stream.feed, ids[:-1])) == 'a'
  tail = stream.flush()
  assert set(tail) == {'\ufffd'} and 'a' + tail == t.decode(ids[:-1])
  assert ''.join(map(stream.feed, ids)) + stream.flush() == 'a✏'  # fit for the next text


def test_ids_that_say_nothing_leave_a_split_character_whole(known):
  t = known['qwen']
  *head, last = t.encode('👍')
  assert t.decode([*head, t.pad_id, 10**6, -1, last]) == streamed(t, [*head, t.eos_id, last]) == '👍'


# Special ids, from the files.

SPECIAL = {  # bos, eos_ids, pad, whether texts begin with bos
  'deepseek': ('<｜begin▁of▁sentence｜>', ['<｜end▁of▁sentence｜>'], '<｜end▁of▁sentence｜>', True),
  'qwen': (None, ['<|im_end|>', '<|endoftext|>'], '<|endoftext|>', False),
  'llama': ('<|begin_of_text|>', ['<|eot_id|>', '<|end_of_text|>', '<|eom_id|>'], '<|eot_id|>', True),
  'fallback': ('<s>', ['</s>'], '</s>', True)}


@every_family
def test_special_ids_are_those_that_the_files_name(known, family):
  t, (bos, eos, pad, adds_bos) = known[family], SPECIAL[family]
  assert t.bos_id == (t.special[bos] if bos else None)
  assert t.eos_ids == tuple(t.special[name] for name in eos) and t.eos_id == t.eos_ids[0]
  assert (t.pad_id, t.adds_bos) == (t.special[pad], adds_bos)  # pad is eos where no file names one
  assert t.decode([i for i in (t.bos_id, t.pad_id, *t.eos_ids) if i is not None]) == ''
  if bos:
    assert t.encode('a b', bos=True) == [t.bos_id, *t.encode('a b')]


def test_names_may_stand_in_the_special_tokens_map_and_ids_in_either_config(tmp_path, known):
  folder, t = write(tmp_path, 'qwen', eos_token=None, pad_token=None), known['qwen']
  (folder / 'generation_config.json').unlink()
  put(folder / 'config.json', {'eos_token_id': t.special['<|im_start|>'], 'pad_token_id': t.special['<think>']})
  found = load_tokenizer(folder)
  assert (found.eos_ids, found.pad_id) == ((t.special['<|im_start|>'],), t.special['<think>'])
  put(folder / 'special_tokens_map.json', {'eos_token': {'content': '<|im_end|>'}, 'pad_token': '<|endoftext|>'})
  put(folder / 'generation_config.json', {'eos_token_id': t.special['<|endoftext|>']})
  load_tokenizer.cache_clear()
  found = load_tokenizer(folder / 'tokenizer.json')  # the file itself, with those beside it
  assert (found.eos_ids, found.pad_id, found.bos_id) == (t.eos_ids, t.pad_id, None)


def test_without_files_that_name_tokens_their_numbers_count(tmp_path):
  folder = write(tmp_path, 'llama')
  (folder / 'tokenizer_config.json').unlink()
  t = load_tokenizer(folder)
  assert t.bos_id == t.special['<|begin_of_text|>'] and t.eos_id == t.special['<|end_of_text|>'] and t.adds_bos


def test_tokens_that_only_the_config_adds_are_there(tmp_path):
  entry = {'347': {'content': '<extra>', 'special': True}}
  t = load_tokenizer(write(tmp_path, 'qwen', added_tokens_decoder=entry))
  assert t.special['<extra>'] == 347 and t.vocab_size == 348 and t.decode([347]) == '<extra>'


def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path, folders, known, sentencepieces):
  put(folders['llama'] / 'special_tokens_map.json', {'bos_token': '<|begin_of_text|>'})
  for n, t in enumerate([*known.values(), *sentencepieces]):
    folder = tmp_path / str(n)
    folder.mkdir()
    assert sorted(t.save(folder)) == sorted(p.name for p in folder.iterdir())
    numbers = pathlib.Path(t.source).parent / 'generation_config.json'  # the model's, which an export writes itself
    if numbers.exists():
      shutil.copy(numbers, folder)
    again = load_tokenizer(folder)
    differ = {k for k, v in vars(again).items() if vars(t)[k] != v}
    assert differ == {'source', '_sp' if isinstance(t, SentencePiece) else '_tokenizers'}  # those are handles
    assert again.encode('What is 😀?') == t.encode('What is 😀?')


# Bad files: the file, what is wrong, the remedy.


def cut(path):
  path.write_text(path.read_text(encoding='utf-8')[:5000], encoding='utf-8')


BAD = {
  'cut': (lambda f: cut(f / 'tokenizer.json'), 'tokenizer.json: not valid JSON', 'cut or damaged, get it again'),
  'bytes': (lambda f: (f / 'tokenizer.json').write_bytes(b'{"\xff'), 'tokenizer.json: not valid JSON', 'get it again'),
  'a list': (lambda f: put(f / 'tokenizer.json', [1]), 'tokenizer.json: holds no JSON object', 'came with the model'),
  'no model': (lambda f: put(f / 'tokenizer.json', {}), 'tokenizer.json: not a tokenizer.json', 'get the file again'),
  'odd added token': (lambda f: edit(f / 'tokenizer.json', lambda d: d.update(added_tokens=[{'id': 1}])),
                      'tokenizer.json: not a tokenizer.json', 'without content'),
  'merges to nowhere': (lambda f: edit(f / 'tokenizer.json', lambda d: d['model']['merges'].append(['zz', 'yy'])),
                        'tokenizer.json: not a tokenizer.json', 'out of vocabulary'),
  'another model': (lambda f: edit(f / 'tokenizer.json', lambda d: d['model'].update(type='WordPiece')),
                    'a WordPiece model is not supported', 'BPE is'),
  'another decoder': (lambda f: edit(f / 'tokenizer.json', lambda d: d.update(
    decoder={'type': 'WordPiece', 'prefix': '##', 'cleanup': True})), 'its decoder (WordPiece) is not supported',
                      'byte-level BPE'),
  'word ends': (lambda f: edit(f / 'tokenizer.json', lambda d: d['model'].update(end_of_word_suffix='</w>')),
                'a BPE model with end_of_word_suffix is not supported'),
  'no eos': (lambda f: (f / 'generation_config.json').unlink() or edit(
    f / 'tokenizer_config.json', lambda d: d.pop('eos_token')), 'no file tells which token ends a text',
    'give eos_token in tokenizer_config.json or eos_token_id in generation_config.json'),
  'eos of another vocabulary': (lambda f: edit(f / 'tokenizer_config.json', lambda d: d.update(eos_token='</s>')),
                                "tokenizer_config.json: eos_token is '</s>'", 'do not belong together'),
  'pad of another vocabulary': (lambda f: edit(f / 'tokenizer_config.json', lambda d: d.update(pad_token='<pad>')),
                                "tokenizer_config.json: pad_token is '<pad>'", 'do not belong together'),
  'eos beyond the vocabulary': (lambda f: put(f / 'generation_config.json', {'eos_token_id': [342, 999]}),
                                'generation_config.json: eos_token_id is [342, 999]', 'no token 999'),
  'eos that is no number': (lambda f: put(f / 'generation_config.json', {'eos_token_id': 'x'}),
                            "generation_config.json: eos_token_id is x", "no token 'x'"),
  'damaged config': (lambda f: (f / 'tokenizer_config.json').write_text('{'), 'tokenizer_config.json: not valid JSON'),
  'no tokenizer': (lambda f: (f / 'tokenizer.json').unlink(), 'has no tokenizer.json and no tokenizer.model',
                   'there is tokenizer_config.json'),
}


@pytest.mark.parametrize('name', BAD)
def test_a_bad_file_is_refused_by_name_with_the_remedy(name, tmp_path):
  spoil, *parts = BAD[name]
  folder = write(tmp_path / 'model', 'qwen')
  spoil(folder)
  with pytest.raises(ValueError) as error:
    load_tokenizer(folder)
  for part in (str(folder), *parts):
    assert part in str(error.value), str(error.value)


def test_a_missing_file_and_a_missing_folder_are_named(tmp_path):
  for name in ('missing', 'missing/tokenizer.json'):
    with pytest.raises(ValueError, match=f"config.tokenizer '{re.escape(str(tmp_path / name))}': No such file or "
                                         "directory; use 'tiny' or the path of a .model file, of a tokenizer.json or"):
      load_tokenizer(tmp_path / name)
  with pytest.raises(ValueError, match='has no tokenizer.json and no tokenizer.model; use'):
    load_tokenizer(tmp_path)


def test_missing_packages_are_named_with_the_way_to_get_them(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(ValueError, match=r"the package `tokenizers` is needed: pip install 'moe_rl\[hf\]'"):
    load_tokenizer(write(tmp_path, 'qwen'))


def test_asking_for_a_bos_that_is_not_there_is_refused(known):
  with pytest.raises(ValueError, match='tokenizer.json: names no bos token'):
    known['qwen'].encode('a', bos=True)
