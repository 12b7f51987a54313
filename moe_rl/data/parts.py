"""A streamed response in its parts: what is thought, what is answered, and the tags between them."""

from moe_rl.data.templates import TAGS

THINKING, ANSWER, TAG = 'thinking', 'answer', 'tag'
_OPEN, _CLOSE = TAGS[:2]


class Splitter:
  """Text as it comes -> (part, text) pieces; put together, their texts are all that was fed.

  A response is an answer until `<think>`, which opens a thought at its beginning alone, and from `</think>` on; tags
  are pieces of their own. thinking: the prompt has opened a thought already. What `feed` withholds may be a tag.
  """

  def __init__(self, thinking: bool = False):
    self.thinking, self.thought_ended, self._held, self._begun = thinking, False, '', thinking

  def feed(self, text: str) -> list[tuple[str, str]]:
    self._held, out = self._held + text, []
    while self._held:
      tag = next((t for t in TAGS if self._held.startswith(t)), None)
      if tag:
        self._pass(tag)
        out.append((TAG, tag))
        self._held = self._held[len(tag):]
      elif any(t.startswith(self._held) for t in TAGS):
        break
      else:
        end = self._held.find('<', 1)
        plain, self._held = (self._held, '') if end < 0 else (self._held[:end], self._held[end:])
        out.append(self._plain(plain))
    return out

  def flush(self) -> list[tuple[str, str]]:
    """What was withheld, which is no tag after all."""
    rest, self._held = self._held, ''
    return [self._plain(rest)] if rest else []

  def _plain(self, text: str) -> tuple[str, str]:
    self._begun |= bool(text.strip())
    return (THINKING if self.thinking else ANSWER), text

  def _pass(self, tag: str):
    if tag == _OPEN and not self._begun:
      self.thinking = True
    elif tag == _CLOSE:
      self.thinking, self.thought_ended = False, True
    self._begun = True
