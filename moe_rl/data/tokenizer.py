"""Tokenizers behind one interface, decoding as it streams, and sentencepiece; `hf_tokenizer` reads tokenizer.json.

The tiny model's has one character a token, tags and a few words whole, and bytes for the rest.
`python -m moe_rl.data.tokenizer` trains it and writes the file that ships with the package.
"""

import argparse
import codecs
import functools
import io
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping

import sentencepiece

ASSETS = pathlib.Path(__file__).parent / 'assets'
TINY = ASSETS / 'tiny_tokenizer.model'
WHOLE = ('<think>', '</think>', '<answer>', '</answer>', 'User:', 'Assistant:', ' then ', ' wait ', ' check ', 'easy',
         'sure', 'hm', '然后', '等等', '检查', '简单')
PRINTABLE = ''.join(chr(c) for c in range(32, 127))
KINDS = "'tiny' or the path of a .model file, of a tokenizer.json or of a folder that has one of them"
PER_BYTE = 'moe_rl.replace_per_byte'  # sentencepiece's way with broken UTF-8: a U+FFFD for every byte, not one a run
codecs.register_error(PER_BYTE, lambda error: ('\ufffd' * (error.end - error.start), error.end))


class Tokenizer:
  """Text to ids and back.

  source: the file, for messages; vocab_size: one more than the largest id; bos_id: None where the files name none;
  eos_id; eos_ids: every id that ends a response, eos_id first; pad_id: the files', else eos_id; special: ids by name of
  the tokens that stand outside ordinary text; adds_bos: the model saw bos before every text; chat_template: Jinja or
  None; roles: such as {'eos_token': name}, what a chat template may ask for.

  Plain text never becomes a special token, whatever it looks like, unless the caller allows that token by name. So a
  user cannot end a turn or open one. (What a vocabulary spells by its own rules is text: the tiny model's '<think>'.)
  """

  source: str
  vocab_size: int
  bos_id: int | None
  eos_id: int
  eos_ids: tuple[int, ...]
  pad_id: int
  special: Mapping[str, int]
  adds_bos = False
  chat_template: str | None = None
  roles: Mapping[str, str] = {}
  # For decoding: bytes by id; ids that give nothing; ids whose leading space goes where the text begins, and whether
  # that goes on while there is no text yet; what becomes of broken UTF-8.
  pieces: list[bytes]
  silent: frozenset[int]
  spaced: frozenset[int] = frozenset()
  strips_all = False
  broken = 'replace'

  def encode(self, text: str, *, bos: bool = False, allow: Collection[str] = ()) -> list[int]:
    """Ids of a text. bos: begin with it; allow: special tokens that the text may spell (others are plain text).

    Raises ValueError for bos=True where the tokenizer has none.
    """
    parts = self.split(text, allow)
    if bos and self.bos_id is None:
      raise ValueError(f'{self.source}: names no bos token, which encode(bos=True) needs: name it in '
                       'tokenizer_config.json (bos_token)')
    return self.encode_parts([self.bos_id, *parts] if bos else parts)

  def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
    """Ids of plain texts and special ids in turn. Neighbouring texts are encoded as one."""
    ids, text = [], ''
    for part in parts:
      if isinstance(part, str):
        text += part
      else:
        ids += [*self._encode(text), part] if text else [part]
        text = ''
    return ids + self._encode(text) if text else ids

  def split(self, text: str, allow: Collection[str]) -> list[str | int]:
    """The text in turn with the ids of the allowed special tokens in it; of several at one place the longest counts."""
    names = tuple(name for name in allow if name in self.special)
    parts, at = [], 0
    for match in self._finder(names).finditer(text) if names else ():
      found = match[0] if match[0] in self.special else match[0].strip()
      parts += [text[at:match.start()], self.special[found]]
      at = match.end()
    return [part for part in (*parts, text[at:]) if part != '']

  @functools.lru_cache(maxsize=8)  # noqa: B019 (tokenizers live as long as the program)
  def _finder(self, names: tuple[str, ...]) -> re.Pattern:
    return re.compile('|'.join(map(self._as_regex, sorted(names, key=len, reverse=True))))

  def _as_regex(self, name: str) -> str:
    return re.escape(name)

  def _encode(self, text: str) -> list[int]:
    raise NotImplementedError

  def decode(self, ids: Iterable[int]) -> str:
    """Text of the ids. Bos, eos, pad and ids beyond the vocabulary give nothing, broken UTF-8 gives U+FFFD; other
    special tokens show their names."""
    stream = StreamDecoder(self)
    return ''.join(map(stream.feed, ids)) + stream.flush()

  def save(self, folder: str | pathlib.Path) -> list[str]:
    """Writes the files that `load_tokenizer(folder)` needs into an existing folder; returns their names."""
    raise NotImplementedError


class StreamDecoder:
  """Text as the ids come, whole characters (code points) only: `feed` every id, then `flush`.

  The parts put together are decode(all ids), for any ids. What `feed` withholds is less than a character.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._utf8 = codecs.getincrementaldecoder('utf-8')(tokenizer.broken)
    self._at_start = True

  def feed(self, token: int) -> str:
    """The text that is whole with this id, often '' inside a character."""
    t = self._tokenizer
    if not 0 <= token < t.vocab_size or token in t.silent:
      return ''
    piece = t.pieces[token]
    if self._at_start:
      piece = piece[1:] if token in t.spaced else piece
      self._at_start = t.strips_all and not piece
    return self._utf8.decode(piece)

  def flush(self) -> str:
    """U+FFFD for bytes that never became a character, '' if there are none; then a new text may begin."""
    self._at_start = True
    return self._utf8.decode(b'', final=True)


class SentencePiece(Tokenizer):
  """A sentencepiece model: decode(encode(text)) == text for any text without lone surrogates and without U+2581, which
  sentencepiece reserves for the space, if the model normalises nothing.

  Its special tokens are its control pieces, eos among them; pad is eos where there is none.
  """

  broken = PER_BYTE

  def __init__(self, model: bytes, source: str):
    """Raises ValueError if it is no model or has no eos piece."""
    self.source, self._model = source, model
    try:
      self._sp = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as e:
      raise ValueError(f'{source}: not a sentencepiece model ({e}); give the path of a .model file') from e
    if sp.eos_id() < 0:
      raise ValueError(f'{source}: has no eos piece; train it with eos_id')
    self.vocab_size = sp.vocab_size()
    self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else None
    self.eos_id, self.eos_ids = sp.eos_id(), (sp.eos_id(),)
    self.pad_id = sp.pad_id() if sp.pad_id() >= 0 else self.eos_id
    self.special = {sp.id_to_piece(i): i for i in range(self.vocab_size) if sp.is_control(i)}
    self.silent = frozenset(self.special.values())
    self._set_pieces()

  def _set_pieces(self):
    """Fills what decoding needs. Whether spaces go at the start is asked of the model by trying."""
    sp, ids = self._sp, range(self.vocab_size)
    names = [sp.id_to_piece(i) for i in ids]
    self.pieces = [
      bytes([int(name[3:5], 16)]) if sp.is_byte(i) else (sp.decode([i]) if sp.is_unknown(i) else
                                                         name.replace('\u2581', ' ')).encode()
      for i, name in enumerate(names)]
    spaced = [i for i in ids if names[i].startswith('\u2581') and i not in self.silent]
    if spaced and sp.decode([spaced[0]]) != names[spaced[0]].replace('\u2581', ' '):
      self.spaced = frozenset(spaced)
      alone = next((i for i in spaced if names[i] == '\u2581'), None)
      self.strips_all = alone is not None and sp.decode([alone, alone]) == ''

  def _encode(self, text: str) -> list[int]:
    return self._sp.encode(text)

  def save(self, folder: str | pathlib.Path) -> list[str]:
    (pathlib.Path(folder) / 'tokenizer.model').write_bytes(self._model)
    return ['tokenizer.model']


@functools.cache
def load_tokenizer(name: str | pathlib.Path = 'tiny') -> Tokenizer:
  """'tiny', a sentencepiece .model file, a tokenizer.json, or a folder that has one.

  A folder's tokenizer.json goes before its tokenizer.model. Raises ValueError naming the file and the remedy when it
  cannot be read, or when its special tokens cannot be told (`hf_tokenizer`).
  """
  path = TINY if name == 'tiny' else pathlib.Path(name)
  try:
    if path.is_dir():
      path = _in_folder(path)
    if path.suffix == '.json':
      from moe_rl.data.hf_tokenizer import HFTokenizer  # needs an extra package
      return HFTokenizer(path)
    return SentencePiece(path.read_bytes(), str(path))
  except OSError as e:
    raise ValueError(f"config.tokenizer '{name}': {e.strerror}; use {KINDS}") from e


def _in_folder(folder: pathlib.Path) -> pathlib.Path:
  for name in ('tokenizer.json', 'tokenizer.model'):
    if (folder / name).exists():
      return folder / name
  others = sorted(p.name for p in folder.glob('*tok*'))
  raise ValueError(f"config.tokenizer '{folder}': the folder has no tokenizer.json and no tokenizer.model" + (
    f' (there is {", ".join(others)}: convert it to tokenizer.json)' if others else f'; use {KINDS}'))


def train_tiny() -> bytes:
  """A character model with byte fallback. Nothing is normalised, so decoding gives back the very text."""
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([PRINTABLE]), model_writer=out, model_type='char',
    vocab_size=1000, hard_vocab_limit=False, character_coverage=1.0, byte_fallback=True, pad_id=0, eos_id=1,
    unk_id=2, bos_id=-1, pad_piece='<pad>', eos_piece='<eos>',
    user_defined_symbols=['\n', *(word.replace(' ', '▁') for word in WHOLE)],
    normalization_rule_name='identity', add_dummy_prefix=False, remove_extra_whitespaces=False,
    minloglevel=2)
  return out.getvalue()


def main():
  parser = argparse.ArgumentParser(description='Trains the tiny tokenizer.')
  parser.add_argument('--out', type=pathlib.Path, default=TINY)
  path = parser.parse_args().out
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(train_tiny())
  print(f'{path}: {SentencePiece(path.read_bytes(), str(path)).vocab_size} pieces')


if __name__ == '__main__':
  main()
