"""tokenizer.json, as DeepSeek, Qwen and Llama ship it, with the files beside it that name its special tokens."""

import dataclasses
import json
import pathlib
import re
import shutil

from moe_rl.data.tokenizer import PER_BYTE, Tokenizer

FILES = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'vocab.json',
         'merges.txt', 'tokenizer.model', 'chat_template.jinja')  # what belongs to a tokenizer, where it is there
NAMING = ('tokenizer_config.json', 'special_tokens_map.json')
NUMBERING = ('generation_config.json', 'config.json')
SPACE = '\u2581'


class HFTokenizer(Tokenizer):
  """A BPE of tokenizer.json, over bytes or with bytes to fall back on: decode(encode(text)) == text for any text
  without lone surrogates, if the file normalises nothing. (Qwen's brings text to NFC; byte fallback reserves U+2581.)

  Ids are those of `transformers` for the same files, but for text that looks like a special token: that stays text
  unless allowed. All that the files add to the vocabulary counts as special here, flagged so or not (DeepSeek's
  `<｜User｜>` is not, and still opens a turn).
  """

  def __init__(self, path: pathlib.Path):
    """path: of a tokenizer.json. Raises ValueError naming file and remedy; OSError if it cannot be opened."""
    self.source = str(path)
    document = read_json(path, needed=True)
    config = read_json(path.parent / 'tokenizer_config.json')
    self._added = _added_tokens(document, config, path)
    self.special = {token['content']: token['id'] for token in self._added.values()}
    model = document.get('model') or {}
    _check_model(model, path)
    names = {**model.get('vocab', {}), **self.special}
    self.vocab_size = max(names.values(), default=-1) + 1
    self._tokenizers = _plain(document, set(self.special), path)

    found = find_special(path.parent, names)
    self.bos_id, self.eos_id, self.pad_id, self.eos_ids = found.bos_id, found.eos_id, found.pad_id, found.eos_ids
    self.roles = found.roles
    self.silent = frozenset(i for i in (self.bos_id, self.pad_id, *self.eos_ids) if i is not None)
    self.adds_bos = self._begins_with_bos(config)
    self.chat_template = _chat_template(path.parent, config)
    self._set_pieces(document.get('decoder') or {}, model.get('vocab', {}))

  def _begins_with_bos(self, config: dict) -> bool:
    """What tokenizer_config.json says, else what tokenizer.json does to a text."""
    says = config.get('add_bos_token')
    if isinstance(says, bool):
      return says and self.bos_id is not None
    return self.bos_id is not None and self._tokenizers.encode('').ids[:1] == [self.bos_id]

  def _set_pieces(self, decoder: dict, vocab: dict[str, int]):
    steps = decoder.get('decoders', [decoder])
    kinds = {step.get('type') for step in steps}
    self.pieces = [b''] * self.vocab_size  # some vocabularies have holes
    if kinds == {'ByteLevel'}:
      table = byte_of_character()
      for name, i in vocab.items():
        known = all(c in table for c in name)
        self.pieces[i] = bytes(table[c] for c in name) if known else name.encode()
    elif kinds <= {'Replace', 'ByteFallback', 'Fuse', 'Strip', 'Metaspace'} and kinds & {'Replace', 'Metaspace'}:
      self.broken = PER_BYTE
      for name, i in vocab.items():
        byte = re.fullmatch('<0x([0-9A-F]{2})>', name) if 'ByteFallback' in kinds else None
        self.pieces[i] = bytes([int(byte[1], 16)]) if byte else name.replace(SPACE, ' ').encode()
      if _strips_a_space(steps):
        self.spaced = frozenset(i for i, piece in enumerate(self.pieces) if piece.startswith(b' '))
    else:
      raise ValueError(f'{self.source}: its decoder ({", ".join(sorted(map(str, kinds)))}) is not supported: those of '
                       'byte-level BPE and of BPE with byte fallback are')
    for name, i in self.special.items():
      self.pieces[i] = name.encode()

  def _encode(self, text: str) -> list[int]:
    return self._tokenizers.encode(text, add_special_tokens=False).ids

  def _as_regex(self, name: str) -> str:
    token = self._added[name]
    text = re.escape(name)
    text = rf'(?<!\w){text}(?!\w)' if token.get('single_word') else text
    return (r'\s*' if token.get('lstrip') else '') + text + (r'\s*' if token.get('rstrip') else '')

  def save(self, folder: str | pathlib.Path) -> list[str]:
    source = pathlib.Path(self.source)
    there = {'tokenizer.json': source} | {n: source.parent / n for n in FILES[1:] if (source.parent / n).is_file()}
    for name, path in there.items():
      shutil.copyfile(path, pathlib.Path(folder) / name)
    return list(there)


@dataclasses.dataclass(frozen=True)
class Special:
  """The special ids of a folder; eos_ids begins with eos_id. roles: names by role, e.g. 'eos_token'."""

  bos_id: int | None
  eos_id: int
  pad_id: int
  eos_ids: tuple[int, ...]
  roles: dict[str, str]


def find_special(folder: pathlib.Path, names: dict[str, int]) -> Special:
  """Special ids as the folder's files name them; names: the vocabulary.

  eos: the name in tokenizer_config.json or special_tokens_map.json and all of eos_token_id in generation_config.json
  (or, if that gives none, in config.json): chat models may end a turn in several ways. pad: its name, else
  pad_token_id of the same files, else eos, as DeepSeek has it. bos: its name, and only where no file names tokens its
  bos_token_id. Raises ValueError naming the file when eos is nowhere or an entry is not in the vocabulary.
  """
  naming = {name: read_json(folder / name) for name in NAMING}
  numbering = {name: read_json(folder / name) for name in NUMBERING}
  roles = _roles(naming, names, folder)

  def numbers(role: str) -> list[int]:
    for file, config in numbering.items():
      if config.get(f'{role}_token_id') is not None:
        return _numbers(config[f'{role}_token_id'], names, f'{folder / file}: {role}_token_id')
    return []

  def named(role: str) -> list[int]:
    return [names[roles[f'{role}_token']]] if f'{role}_token' in roles else []
  eos_ids = tuple(dict.fromkeys(named('eos') + numbers('eos')))
  if not eos_ids:
    raise ValueError(f'{folder}: no file tells which token ends a text: give eos_token in tokenizer_config.json or '
                     'eos_token_id in generation_config.json')
  bos = named('bos') or ([] if any(naming.values()) else numbers('bos'))
  pad = named('pad') or numbers('pad') or eos_ids
  return Special(bos[0] if bos else None, eos_ids[0], pad[0], eos_ids, roles)


def _roles(naming: dict[str, dict], names: dict[str, int], folder: pathlib.Path) -> dict[str, str]:
  """Names of bos, eos, pad and unk, the first file's first; each is in the vocabulary, or ValueError."""
  roles = {}
  for file, config in naming.items():
    for role in ('bos_token', 'eos_token', 'pad_token', 'unk_token'):
      name = config.get(role)
      name = name.get('content') if isinstance(name, dict) else name
      if name is None or role in roles:
        continue
      if name not in names:
        raise ValueError(f"{folder / file}: {role} is {name!r}, which tokenizer.json does not have: the files do not "
                         'belong together, or the token is misspelt')
      roles[role] = name
  return roles


def _numbers(given, names: dict[str, int], where: str) -> list[int]:
  known, ids = set(names.values()), given if isinstance(given, list) else [given]
  for i in ids:
    if type(i) is not int or i not in known:
      raise ValueError(f'{where} is {given}, but tokenizer.json has no token {i!r}: the files do not belong together, '
                       'or the entry is wrong')
  return ids


def read_json(path: pathlib.Path, needed: bool = False) -> dict:
  """A JSON object; {} where the file is missing, unless needed. Raises ValueError naming an unreadable file."""
  if not needed and not path.exists():
    return {}
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as e:  # also bytes that are no UTF-8
    raise ValueError(f'{path}: not valid JSON ({e}): the file is cut or damaged, get it again') from e
  if not isinstance(found, dict):
    raise ValueError(f'{path}: holds no JSON object: give the file that came with the model')
  return found


def byte_of_character() -> dict[str, int]:
  """Byte-level BPE writes a byte as a character: printable Latin-1 as itself, the others in turn from U+0100."""
  printable = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
  others = [b for b in range(256) if b not in printable]
  return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


def _added_tokens(document: dict, config: dict, path: pathlib.Path) -> dict[str, dict]:
  """The added tokens by name: tokenizer.json's, and those that only tokenizer_config.json lists."""
  listed = [{**token, 'id': int(i)} for i, token in (config.get('added_tokens_decoder') or {}).items()]
  try:
    return {token['content']: token for token in [*listed, *(document.get('added_tokens') or [])]}
  except (KeyError, TypeError) as e:
    raise ValueError(f'{path}: not a tokenizer.json (an added token without content): get the file again') from e


def _check_model(model: dict, path: pathlib.Path):
  kind = model.get('type', 'BPE')
  odd = [key for key in ('continuing_subword_prefix', 'end_of_word_suffix') if model.get(key)]
  if kind != 'BPE' or odd:
    raise ValueError(f'{path}: a {kind} model{f" with {odd[0]}" if odd else ""} is not supported: BPE is, which all '
                     'DeepSeek, Qwen and Llama models have')


def _plain(document: dict, special: set[str], path: pathlib.Path):
  """The library's tokenizer without the special tokens: it sees text alone. No dropout, cutting or padding either."""
  try:
    import tokenizers
  except ImportError as e:
    raise ValueError(f"{path}: to read it the package `tokenizers` is needed: pip install 'moe_rl[hf]'") from e
  model = document.get('model') or {}
  vocab = model.get('vocab') or {}
  if model.get('ignore_merges') and special & vocab.keys():
    # Such a model takes a word whole that its vocabulary has, whether or not merges lead there.
    keep = {''.join(m.split(' ') if isinstance(m, str) else m) for m in model['merges']} | {model.get('unk_token')}
    vocab = {name: i for name, i in vocab.items() if name not in special or name in keep or len(name) == 1}
  document = document | {'added_tokens': [], 'truncation': None, 'padding': None,
                         'model': model | {'dropout': None, 'vocab': vocab}}
  try:
    return tokenizers.Tokenizer.from_str(json.dumps(document))
  except Exception as e:  # the library raises nothing narrower
    raise ValueError(f'{path}: not a tokenizer.json that can be read ({e}): get the file again') from e


def _strips_a_space(steps: list[dict]) -> bool:
  return any(step['type'] == 'Strip' and step.get('start') == 1 or
             step['type'] == 'Metaspace' and step.get('prepend_scheme', 'always') != 'never' for step in steps)


def _chat_template(folder: pathlib.Path, config: dict) -> str | None:
  """chat_template.jinja, else tokenizer_config.json's, of several the one named 'default'."""
  path = folder / 'chat_template.jinja'
  if path.is_file():
    return path.read_text(encoding='utf-8')
  found = config.get('chat_template')
  if isinstance(found, list):
    found = {entry.get('name'): entry.get('template') for entry in found}.get('default')
  return found
