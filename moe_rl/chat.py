"""A conversation with any checkpoint, its thoughts shown as they come.

`python -m moe_rl.chat [--init_from=DIR] [--question=TEXT] [--max_think=N] [--max_new=N] [--temperature=T] …`

Without --question it reads a question a line. Ctrl-C ends an answer, the end of the input (Ctrl-D) the program. A
thought that has used its budget is ended by `</think>`, and the answer follows. On a terminal thoughts are dim and
tags are not shown; into a pipe goes the text as it is, remarks to stderr. Earlier questions are remembered where the
template can (r1, r1_think, chat), without their thoughts. Runs on this host's first device.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator

from moe_rl.data import parts
from moe_rl.data.templates import CHATS, NAMES, TAGS, conversation_ids, opening, prompt_ids
from moe_rl.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from moe_rl.models.checkpoints import Checkpoint, check_speaks, made_for, open_checkpoint
from moe_rl.models.hf_import import load_model
from moe_rl.models.transformer import Transformer
from moe_rl.rl.rewards.extract import conclusion
from moe_rl.rl.stream import SHORTEST, Stream
from moe_rl.runtime.keys import key_for

THINK, NEW = 4096, 1024  # tokens, where the model has room for them
REMARK = 'remark'  # a part of what `Chat.ask` gives: said by the program


class Chat:
  """A conversation. stream: with room for `room_for(…)` tokens; max_think: tokens of a thought before it is ended;
  max_new: tokens of an answer beside it; seed: with the number of the question it addresses the draws."""

  def __init__(self, stream: Stream, tokenizer: Tokenizer, template: str, max_think: int, max_new: int, seed: int = 0):
    self.stream, self.tokenizer, self.template = stream, tokenizer, template
    self.max_think, self.max_new = max_think, max_new
    self._key, self._asked = key_for(seed, 'chat'), 0
    self._opening, self._close = opening(template, tokenizer), closing(tokenizer)
    self.messages: list[dict[str, str]] = []
    self.tokens: list[int] = []  # of the last response

  def ask(self, question: str) -> Iterator[tuple[str, str]]:
    """(part, text) pieces as they come: `parts.THINKING`, `ANSWER` and `TAG`, whose texts put together are the
    response, and `REMARK`. It may be closed at any piece; what was said till then is remembered.

    Raises ValueError for a question that the model has no room for.
    """
    prompt, text = self._prompt(question), []
    if self._forgot:
      yield REMARK, 'no room for what was said before: it is forgotten'
    response = self.stream.start(prompt, self._key, self._asked)
    self._asked += 1
    self.tokens, heard = response.tokens, _Heard(self.tokenizer, bool(self._opening))
    try:
      if self._opening:
        text.append(self._opening)
        yield parts.TAG, self._opening
      for part, piece in self._pieces(response, heard):
        if part != REMARK:
          text.append(piece)
        yield part, piece
    finally:
      said = (conclusion(''.join(text)) or '').strip()
      self.messages += [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': said}]

  def _pieces(self, response, heard: '_Heard') -> Iterator[tuple[str, str]]:
    thought = answered = 0
    while True:
      if heard.thinking and thought >= self.max_think:
        yield REMARK, f'the thought has used its {thought} tokens and is ended'
        for token in self._close:
          response.take(token)
          yield from heard.feed(token)
        continue
      if answered >= self.max_new:
        yield from heard.flush()
        yield REMARK, f'the answer has used its {answered} tokens and is cut'
        return
      token = response.proposed
      thought, answered = thought + heard.thinking, answered + (not heard.thinking)
      ended = token in self.tokenizer.eos_ids
      if ended:
        response.tokens.append(token)  # nothing is drawn after it
        yield from heard.flush()
        return
      response.take(token)
      yield from heard.feed(token)

  def _prompt(self, question: str) -> list[int]:
    """Ids of the conversation with its next question; what was said before is forgotten where there is no room."""
    asked, most = [{'role': 'user', 'content': question}], self.stream.net.config.max_length - self.stream.room
    self._forgot = False
    if self.template not in CHATS:
      ids = prompt_ids(self.template, self.tokenizer, question)
    else:
      ids = conversation_ids(self.template, self.tokenizer, self.messages + asked)
      if len(ids) > most and self.messages:
        self._forgot, self.messages = True, []
        ids = conversation_ids(self.template, self.tokenizer, asked)
    if len(ids) > most:
      raise ValueError(f'the question has {len(ids)} tokens, with the template; there is room for {most}, as thought '
                       f'and answer may take {self.stream.room} of the {self.stream.net.config.max_length} that the '
                       'model reads: shorten it, or lower --max_think or --max_new')
    return ids


class _Heard:
  """Tokens in, pieces of whole characters out."""

  def __init__(self, tokenizer: Tokenizer, thinking: bool):
    self._decoder, self._splitter = StreamDecoder(tokenizer), parts.Splitter(thinking)

  @property
  def thinking(self) -> bool:
    return self._splitter.thinking

  def feed(self, token: int) -> list[tuple[str, str]]:
    return self._splitter.feed(self._decoder.feed(token))

  def flush(self) -> list[tuple[str, str]]:
    return [*self._splitter.feed(self._decoder.flush()), *self._splitter.flush()]


def closing(tokenizer: Tokenizer) -> list[int]:
  """Ids of `</think>`, one where the vocabulary has it."""
  return tokenizer.encode('</think>', allow=TAGS)


def room_for(tokenizer: Tokenizer, max_think: int, max_new: int) -> int:
  """Tokens that a response may come to."""
  return max_think + len(closing(tokenizer)) + max_new


class Screen:
  """Shows the pieces: on a terminal thoughts dim, tags as a new line; else the bare text, and remarks elsewhere."""

  DIM, PLAIN = '\x1b[2m', '\x1b[0m'

  def __init__(self, out, remarks, terminal: bool):
    self._out, self._remarks, self._terminal = out, remarks, terminal
    self._line_begun = False

  def show(self, part: str, text: str):
    if part == REMARK:
      self.remark(text)
    elif not self._terminal:
      self._write(text)
    elif part == parts.TAG:
      self.end_line()
    else:
      self._write(f'{self.DIM}{text}{self.PLAIN}' if part == parts.THINKING else text)

  def remark(self, text: str):
    if self._terminal:
      self.end_line()
      self._write(f'{self.DIM}[{text}]{self.PLAIN}\n')
      self._line_begun = False
    else:
      print(f'[{text}]', file=self._remarks, flush=True)

  def end_line(self):
    if self._line_begun:
      self._write('\n')
      self._line_begun = False

  def _write(self, text: str):
    self._out.write(text)
    self._out.flush()
    self._line_begun = self._line_begun or bool(text)


def answer(chat: Chat, question: str, screen: Screen) -> bool:
  """Shows a response; False if the question was refused. Ctrl-C ends it."""
  try:
    with contextlib.closing(chat.ask(question)) as pieces:
      for part, text in pieces:
        screen.show(part, text)
  except KeyboardInterrupt:
    screen.remark('stopped')
  except ValueError as e:
    screen.end_line()
    print(f'error: {e}', file=sys.stderr)
    return False
  screen.end_line()
  return True


def converse(chat: Chat, screen: Screen, ask) -> None:
  """Questions by `ask()`, which raises EOFError when there are no more."""
  while True:
    try:
      question = ask().strip()
    except EOFError:
      return
    except KeyboardInterrupt:
      print(file=sys.stderr)
      continue
    if question:
      answer(chat, question, screen)


def open_chat(args) -> Chat:
  """The conversation that the command line asks for. Raises ValueError before any weight is read."""
  checkpoint = open_checkpoint(args.init_from)
  check_speaks(checkpoint)
  if args.temperature < 0 or not 0 < args.top_p <= 1:
    raise ValueError(f'--temperature={args.temperature:g} --top_p={args.top_p:g}: a temperature is 0 (the likeliest '
                     'token) or more, top_p in (0, 1]')
  tokenizer, template = companions(checkpoint, args.tokenizer, args.template)
  most = checkpoint.model.max_length
  max_new = min(NEW, most // 4) if args.max_new is None else args.max_new
  max_think = min(THINK, most // 4) if args.max_think is None else args.max_think
  if max_new < 1 or max_think < 0:
    raise ValueError(f'--max_new={max_new} --max_think={max_think}: an answer has 1 token or more, a thought 0 or more')
  room = room_for(tokenizer, max_think, max_new)
  if room + SHORTEST > most:
    raise ValueError(f'--max_think={max_think} --max_new={max_new}: together with a question of {SHORTEST} tokens more '
                     f'than the model reads ({most}): lower one')
  model, variables = load_model(checkpoint, compute_dtype=args.dtype, param_dtype=args.dtype, remat='none',
                                mtp_layers=0)
  stream = Stream(Transformer(model), variables, room=room, temperature=args.temperature, top_p=args.top_p)
  return Chat(stream, tokenizer, template, max_think, max_new, args.seed)


def companions(checkpoint: Checkpoint, tokenizer: str = '', template: str = '') -> tuple[Tokenizer, str]:
  """The tokenizer and the template: those that are given, else those that belong to the weights, else the tokenizer's
  own chat template, or R1-Zero's. Raises ValueError where no tokenizer is known, or one that has too many ids."""
  own_tokenizer, own_template = made_for(checkpoint)
  name = tokenizer or own_tokenizer
  if not name:
    raise ValueError(f"{checkpoint.where}: the file does not say which tokenizer it has: give --tokenizer ('tiny' or a "
                     'path)')
  found = load_tokenizer(name)
  if found.vocab_size > checkpoint.model.vocab_size:
    raise ValueError(f'{found.source}: its vocabulary ({found.vocab_size}) is larger than the embedding of the model '
                     f'({checkpoint.model.vocab_size} rows): give the tokenizer that the model was trained with')
  template = template or own_template or ('chat' if found.chat_template else 'r1_zero')
  opening(template, found)  # refuses what the tokenizer lacks
  return found, template


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog='python -m moe_rl.chat', description=__doc__.splitlines()[0])
  parser.add_argument('--init_from', default='embedded', help='a checkpoint: a folder, a hub id, a file of ours, a '
                      "run; default: the base in the package, which can do sums such as '8+1-8+9=?'")
  parser.add_argument('--question', help='one question, after whose answer the program ends')
  parser.add_argument('--template', default='', choices=('', *NAMES), help='default: as the checkpoint has it')
  parser.add_argument('--tokenizer', default='', help="if it does not lie with the weights: 'tiny' or a path")
  parser.add_argument('--max_think', type=int, help=f'tokens of a thought; default: {THINK}, or as there is room')
  parser.add_argument('--max_new', type=int, help=f'tokens of an answer; default: {NEW}, or as there is room')
  parser.add_argument('--temperature', type=float, default=0.6, help='0: the likeliest token; default: %(default)s')
  parser.add_argument('--top_p', type=float, default=0.95, help='default: %(default)s')
  parser.add_argument('--seed', type=int, default=0, help='of the draws')
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'), help='to load and compute in')
  args = parser.parse_args(argv)
  try:
    chat = open_chat(args)
  except ValueError as e:  # bad input: the message is for a person, a traceback is not
    print(f'error: {e}', file=sys.stderr)
    return 2
  terminal = sys.stdout.isatty()
  screen = Screen(sys.stdout, sys.stderr, terminal)
  if args.question is not None:
    return 0 if answer(chat, args.question, screen) else 2
  if terminal and sys.stdin.isatty():
    screen.remark(f'{args.init_from}, template {chat.template}, {chat.max_think} tokens to think, {chat.max_new} to '
                  'answer; Ctrl-C ends an answer, Ctrl-D the program')
    converse(chat, screen, lambda: input('> '))
  else:
    converse(chat, screen, _next_line)
  return 0


def _next_line() -> str:
  line = sys.stdin.readline()
  if not line:
    raise EOFError
  return line


if __name__ == '__main__':
  sys.exit(main())
