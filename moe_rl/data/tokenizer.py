"""The tokenizer of the tiny model: one character a token, tags and a few words whole, bytes for the rest.

`python -m moe_rl.data.tokenizer` trains it and writes the file that ships with the package.
"""

import argparse
import functools
import io
import pathlib
from collections.abc import Sequence

import sentencepiece

ASSETS = pathlib.Path(__file__).parent / 'assets'
TINY = ASSETS / 'tiny_tokenizer.model'
WHOLE = ('<think>', '</think>', '<answer>', '</answer>', 'User:', 'Assistant:', 'wait', 'check', 'easy', 'sure', 'hm')
PRINTABLE = ''.join(chr(c) for c in range(32, 127))


class Tokenizer:
  """Text to ids and back without loss: decode(encode(text)) == text for any text without lone surrogates
  and without U+2581, which sentencepiece reserves for the space."""

  def __init__(self, model: bytes, source: str):
    try:
      self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as e:
      raise ValueError(f'{source}: not a sentencepiece model ({e}); give the path of a .model file') from e
    self.pad_id, self.eos_id = self._sp.pad_id(), self._sp.eos_id()
    if self.eos_id < 0 or self.pad_id < 0:
      raise ValueError(f'{source}: has no pad or no eos piece; train it with pad_id and eos_id')

  @property
  def vocab_size(self) -> int:
    return self._sp.vocab_size()

  def encode(self, text: str) -> list[int]:
    return self._sp.encode(text)

  def decode(self, ids: Sequence[int]) -> str:
    """Text of the ids; pad and eos give nothing, a broken byte sequence gives U+FFFD."""
    top = self.vocab_size
    return self._sp.decode([int(i) for i in ids if i not in (self.pad_id, self.eos_id) and i < top])


@functools.cache
def load_tokenizer(name: str = 'tiny') -> Tokenizer:
  """'tiny', or the path of a sentencepiece model. Raises ValueError with the path when it cannot be read."""
  path = TINY if name == 'tiny' else pathlib.Path(name)
  try:
    return Tokenizer(path.read_bytes(), str(path))
  except OSError as e:
    raise ValueError(f"config.tokenizer '{name}': {e.strerror}; use 'tiny' or the path of a .model file") from e


def train_tiny() -> bytes:
  """A character model with byte fallback. Nothing is normalised, so decoding gives back the very text."""
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([PRINTABLE]), model_writer=out, model_type='char',
    vocab_size=1000, hard_vocab_limit=False, character_coverage=1.0, byte_fallback=True, pad_id=0, eos_id=1,
    unk_id=2, bos_id=-1, pad_piece='<pad>', eos_piece='<eos>', user_defined_symbols=['\n', *WHOLE],
    normalization_rule_name='identity', add_dummy_prefix=False, remove_extra_whitespaces=False,
    minloglevel=2)
  return out.getvalue()


def main():
  parser = argparse.ArgumentParser(description='Trains the tiny tokenizer.')
  parser.add_argument('--out', type=pathlib.Path, default=TINY)
  path = parser.parse_args().out
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(train_tiny())
  print(f'{path}: {Tokenizer(path.read_bytes(), str(path)).vocab_size} pieces')


if __name__ == '__main__':
  main()
