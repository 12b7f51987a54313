"""A tokenizer's own chat template (Jinja), such that what people write in messages stays text."""

import functools
import itertools
import json
import re
from collections.abc import Collection

from moe_rl.data.tokenizer import Tokenizer


def chat_parts(tokenizer: Tokenizer, messages: list[dict[str, str]], spelt: Collection[str] = ()) -> list[str | int]:
  """Texts and special ids of a conversation that the assistant is to go on with, for `Tokenizer.encode_parts`.

  Special tokens come from the template alone: in a message they are text, but for those of `spelt` in the assistant's.
  The template does not learn what day it is (`strftime_now`), as a resumed run would then get other prompts; Llama's
  falls back on a fixed date. Raises ValueError naming the file where there is no template or it fails.
  """
  where = tokenizer.source
  if not tokenizer.chat_template:
    raise ValueError(f"config.template 'chat': beside {where} is no chat template (chat_template.jinja, or "
                     "chat_template in tokenizer_config.json): add it, or use config.template 'r1_zero'")
  template = _compiled(tokenizer.chat_template, where)
  texts = [text for message in messages for text in message.values()]
  cover = _Cover(tokenizer.special, (tokenizer.chat_template, *texts))
  covered = [{key: text if key == 'role' else cover.hide(text, spelt if message['role'] == 'assistant' else ())
              for key, text in message.items()} for message in messages]
  try:
    rendered = template.render(messages=covered, add_generation_prompt=True, **tokenizer.roles)
  except Exception as e:  # a template is a program, of whoever made the folder
    raise ValueError(f'{where}: its chat template fails on these messages: {cover.show(str(e))}') from e
  return [cover.show(part) if isinstance(part, str) else part for part in tokenizer.split(rendered, tokenizer.special)]


class _Cover:
  """Hides the first character of whatever looks like a special token behind one of private use that occurs nowhere."""

  def __init__(self, names: Collection[str], texts: Collection[str]):
    self._names = tuple(names)
    used = set().union(*texts)
    spare = (chr(c) for c in itertools.chain(range(0xe000, 0xf900), range(0xf0000, 0xffffe)) if chr(c) not in used)
    self._to = {c: next(spare) for c in sorted({name[0] for name in self._names})}
    self._back = str.maketrans({v: k for k, v in self._to.items()})

  def hide(self, text: str, but: Collection[str]) -> str:
    look = _starts(tuple(name for name in self._names if name not in but))
    return look.sub(lambda match: self._to[match[0]], text)

  def show(self, text: str) -> str:
    return text.translate(self._back)


@functools.lru_cache(maxsize=8)
def _starts(names: tuple[str, ...]) -> re.Pattern:
  """Finds every character at which one of the names begins, also inside another's occurrence."""
  return re.compile(f'(?=(?:{"|".join(map(re.escape, names))})).' if names else r'(?!)', re.DOTALL)


@functools.lru_cache(maxsize=8)
def _compiled(source: str, where: str):
  try:
    import jinja2
    import jinja2.sandbox
  except ImportError as e:
    raise ValueError(f"{where}: its chat template needs the package `jinja2`: pip install 'moe_rl[hf]'") from e

  def fail(message):
    raise ValueError(message)
  # The options, tojson and raise_exception are what templates are written for.
  env = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
  env.filters['tojson'] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
  env.globals['raise_exception'] = fail
  try:
    return env.from_string(source)
  except jinja2.TemplateSyntaxError as e:
    raise ValueError(f'{where}: line {e.lineno} of its chat template is not Jinja: {e.message}') from e
