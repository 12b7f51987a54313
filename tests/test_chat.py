"""Chat: its tokens are the sampler's, its text is whole, a thought has a budget, Ctrl-C ends an answer alone."""

import dataclasses
import io
import re
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model, tiny_variables

from moe_rl import chat
from moe_rl.data import parts
from moe_rl.data.parts import Splitter
from moe_rl.data.templates import prompt_ids
from moe_rl.data.tokenizer import load_tokenizer
from moe_rl.models.transformer import Transformer
from moe_rl.models.weights import save_weights
from moe_rl.rl.sampler import make_sampler
from moe_rl.rl.stream import SHORTEST, Stream
from moe_rl.runtime.keys import key_for

ROOM = 24
TOKENIZER = load_tokenizer('tiny')


@pytest.fixture(scope='module')
def net():
  return Transformer(tiny_model(vocab_size=TOKENIZER.vocab_size, layers=2, max_length=192))


@pytest.fixture(scope='module')
def variables(net):
  """An end that is never drawn, so that answers have the length that is asked for."""
  variables = tiny_variables(net.config)
  for eos in TOKENIZER.eos_ids:
    variables['params']['unembed'][:, eos] = 0
  return variables


@pytest.fixture(scope='module')
def greedy(net, variables):
  return Stream(net, variables, room=ROOM, temperature=0.0)


@pytest.fixture(scope='module')
def warm(net, variables):
  return Stream(net, variables, room=ROOM, temperature=1.0, top_p=0.9)


def drawn(stream: Stream, prompt, count: int = ROOM, problem: int = 0) -> list[int]:
  response = stream.start(prompt, key_for(0, 'chat'), problem)
  while len(response.tokens) < count:
    response.take(response.proposed)
  return response.tokens


# Tokens.


@pytest.mark.parametrize('kind', ['greedy', 'warm'])
def test_tokens_are_the_samplers_at_the_same_address(kind, greedy, warm, net, variables):
  """Greedy: the sampler at temperature 1e-4, where the likeliest token's rivals have no mass left to be drawn."""
  stream, settings = (greedy, dict(temperature=1e-4)) if kind == 'greedy' else (warm, dict(temperature=1.0, top_p=0.9))
  sample = jax.jit(make_sampler(net, group=1, max_new=ROOM, eos_id=net.config.vocab_size, **settings))
  prompts = [prompt_ids('short', TOKENIZER, q) for q in ('8+1-8+9=?', '3+4=?')]
  width = max(map(len, prompts))
  ids = np.array([p + [0] * (width - len(p)) for p in prompts], np.int32)
  rollout = sample(variables, ids, np.array(list(map(len, prompts)), np.int32), np.arange(2), key_for(0, 'chat'))
  for problem, prompt in enumerate(prompts):
    assert drawn(stream, prompt, problem=problem) == rollout.response_BxGxS[problem, 0].tolist()


def test_greedy_tokens_are_the_argmax_of_the_whole_forward_pass_in_every_bucket(greedy, net, variables):
  short = np.random.default_rng(0).integers(2, 64, 70).tolist()
  assert (greedy.bucket(20), greedy.bucket(70)) == (SHORTEST, 2 * SHORTEST)

  @jax.jit
  def likeliest(variables, ids):
    hidden = net.apply(variables, ids, jnp.arange(ids.shape[1])[None], jnp.ones_like(ids)).hidden_NxTxD
    return net.apply(variables, hidden, method=net.logits).argmax(-1)
  for prompt in (short[:20], short):
    tokens = drawn(greedy, prompt, 12)
    whole = np.zeros((1, 96), np.int32)  # causal: what follows a token changes nothing
    whole[0, :len(prompt) + 12] = prompt + tokens
    assert likeliest(variables, whole)[0, len(prompt) - 1:len(prompt) + 11].tolist() == tokens


def test_any_token_may_be_put_in_and_the_room_is_kept(greedy, net, variables):
  prompt = prompt_ids('short', TOKENIZER, '3+4=?')
  response = greedy.start(prompt, key_for(0, 'chat'))
  response.take(7)
  assert response.proposed == drawn(greedy, [*prompt, 7], 1)[0]
  while not response.full:
    response.take(7)
  with pytest.raises(ValueError, match=f'the response has its {ROOM} tokens'):
    response.take(7)


# Parts.


@pytest.mark.parametrize('opened, text, wanted', [
  (False, '<think>1+2</think><answer>3</answer>', 'g:<think> t:1+2 g:</think> g:<answer> a:3 g:</answer>'),
  (True, '1<2</think>3', 't:1<2 g:</think> a:3'),
  (False, '3 <think> 4', 'a:3_ g:<think> a:_4'),
  (False, 'a</thi', 'a:a</thi'), (False, '<<think', 'a:<<think'), (True, 'x', 't:x'), (False, '', '')])
def test_a_response_falls_into_thought_answer_and_tags_however_it_is_cut(opened, text, wanted):
  letters = {parts.TAG: 'g', parts.THINKING: 't', parts.ANSWER: 'a'}
  for size in (1, 2, 5, 100):
    splitter, joined = Splitter(opened), []
    pieces = [p for i in range(0, len(text), size) for p in splitter.feed(text[i:i + size])] + splitter.flush()
    assert ''.join(t for _, t in pieces) == text
    for part, piece in pieces:
      if joined and joined[-1][0] == part != parts.TAG:
        joined[-1] = part, joined[-1][1] + piece
      else:
        joined.append((part, piece))
    assert ' '.join(f'{letters[part]}:{piece.replace(" ", "_")}' for part, piece in joined) == wanted


# A conversation, with scripted tokens: what is tested is what becomes of them.


class Script:
  """A stream whose responses are given texts. What it was asked is in `prompts`."""

  def __init__(self, *texts: str, room: int = 200, max_length: int = 1000):
    self.texts, self.room, self.prompts = [TOKENIZER.encode(t, allow=parts.TAGS) for t in texts], room, []
    self.net = types.SimpleNamespace(config=types.SimpleNamespace(max_length=max_length))

  def start(self, prompt, key, problem):
    self.prompts.append(TOKENIZER.decode(prompt))
    ids = [*self.texts[problem], TOKENIZER.eos_id]
    response = types.SimpleNamespace(tokens=[], proposed=ids[0])

    def take(token):
      response.tokens.append(token)
      if token == ids[0]:  # what is forced is not of the script
        ids.pop(0)
      response.proposed = ids[0]
    response.take = take
    return response


def heard(conversation: chat.Chat, question: str = '1+2=?') -> tuple[str, list[str], str]:
  """(text, remarks, thought) of a response."""
  pieces = list(conversation.ask(question))
  text = ''.join(t for part, t in pieces if part != chat.REMARK)
  return text, [t for part, t in pieces if part == chat.REMARK], ''.join(t for p, t in pieces if p == parts.THINKING)


def test_the_streamed_text_is_the_decoding_of_all_tokens_with_no_half_characters():
  text = '<think>一 then 二</think><answer>从三 é</answer>'
  conversation = chat.Chat(Script(text), TOKENIZER, 'short', 100, 100)
  pieces = list(conversation.ask('从1数到2'))
  assert ''.join(t for _, t in pieces) == text == TOKENIZER.decode(conversation.tokens)
  assert not any('\ufffd' in t for _, t in pieces) and len(pieces) == 11  # as it came: 4 tags, 3 and 4 pieces
  assert conversation.stream.prompts == ['User:从1数到2Assistant:']


def test_a_thought_that_has_used_its_budget_is_ended_by_the_tag_and_the_answer_follows(greedy):
  conversation = chat.Chat(Script('<think>123456789', room=50), TOKENIZER, 'short', 4, 3)
  text, remarks, thought = heard(conversation)
  assert thought == '1234' and text.startswith('<think>1234</think>')
  assert remarks[0] == 'the thought has used its 4 tokens and is ended'
  assert remarks[1] == 'the answer has used its 3 tokens and is cut'
  assert len(conversation.tokens) == 8  # <think>, which is one of the 3, and </think>, which is none
  # The model itself, whose random weights never end a thought: the forced tag is read by it like any other token.
  greedy_chat = chat.Chat(greedy, TOKENIZER, 'short', 6, 8)
  greedy_chat._opening = '<think>'
  text, remarks, _ = heard(greedy_chat)
  tokens, [close] = greedy_chat.tokens, chat.closing(TOKENIZER)
  assert tokens[6] == close and close not in tokens[:6] and len(tokens) == 6 + 1 + 8
  assert '6 tokens and is ended' in remarks[0] and text == '<think>' + TOKENIZER.decode(tokens)
  prompt = prompt_ids('short', TOKENIZER, '1+2=?')
  assert drawn(greedy, [*prompt, *tokens[:7]], 8) == tokens[7:]


def test_a_thought_within_its_budget_is_left_alone():
  conversation = chat.Chat(Script('<think>12</think>3'), TOKENIZER, 'short', 100, 100)
  assert heard(conversation) == ('<think>12</think>3', [], '12')
  assert conversation.tokens[-1] == TOKENIZER.eos_id


def test_earlier_turns_are_remembered_without_their_thoughts_and_forgotten_where_there_is_no_room(monkeypatch):
  asked = []

  def conversation_ids(template, tokenizer, messages):
    asked.append([m['content'] for m in messages])
    return TOKENIZER.encode(''.join(asked[-1]))
  monkeypatch.setattr(chat, 'conversation_ids', conversation_ids)
  monkeypatch.setattr(chat, 'opening', lambda template, tokenizer: '')
  script = Script('<think>a</think>one', '<think>never ends', 'three', 'four', room=20, max_length=40)
  conversation = chat.Chat(script, TOKENIZER, 'r1', 100, 100)
  for question in ('q1', 'q2', 'q3'):
    assert heard(conversation, question)[1] == []
  assert asked[2] == ['q1', 'one', 'q2', '', 'q3']
  assert heard(conversation, 'a longer one')[1] == ['no room for what was said before: it is forgotten']
  assert asked[-1] == ['a longer one'] and [m['content'] for m in conversation.messages] == ['a longer one', 'four']
  with pytest.raises(ValueError, match='the question has 30 tokens, .* there is room for 20'):
    next(conversation.ask('x' * 30))


# The screen and the keys.


def test_on_a_terminal_thoughts_are_dim_and_tags_are_not_shown_and_a_pipe_gets_the_bare_text():
  text, shown = '<think>12</think><answer>3</answer>', {}
  for terminal in (True, False):
    out, remarks = io.StringIO(), io.StringIO()
    screen = chat.Screen(out, remarks, terminal)
    assert chat.answer(chat.Chat(Script(text), TOKENIZER, 'short', 1, 99), '1+2=?', screen)
    shown[terminal] = out.getvalue(), remarks.getvalue()
  remark = 'the thought has used its 1 tokens and is ended'
  assert shown[False] == ('<think>1</think>2</think><answer>3</answer>\n', f'[{remark}]\n')
  assert re.sub(r'\x1b\[2m(.*?)\x1b\[0m', r'(\1)', shown[True][0]) == f'(1)\n([{remark}])\n2\n3\n'


def test_ctrl_c_ends_an_answer_and_the_end_of_the_input_the_conversation():
  class Out(io.StringIO):
    def write(self, text):
      if text == '5' and 'stop' not in self.getvalue():
        signal.raise_signal(signal.SIGINT)  # as the terminal does, amid an answer
      return super().write(text)
  out, remarks = Out(), io.StringIO()
  conversation = chat.Chat(Script('12345', '678'), TOKENIZER, 'short', 9, 99)
  questions = iter(['first', '', 'second'])

  def ask():
    for question in questions:
      return question
    raise EOFError
  before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever ran in this process before
  try:
    chat.converse(conversation, chat.Screen(out, remarks, False), ask)
  finally:
    signal.signal(signal.SIGINT, before)
  assert out.getvalue() == '1234\n678\n' and remarks.getvalue() == '[stopped]\n'
  assert [m['content'] for m in conversation.messages] == ['first', '12345', 'second', '678']


# The command.


@pytest.fixture(scope='module')
def file(tmp_path_factory, net, variables):
  path = tmp_path_factory.mktemp('chat') / 'model.safetensors'
  save_weights(path, jax.tree.map(jnp.asarray, variables), dataclasses.asdict(net.config), 'float32')
  return path


def test_one_question_by_the_command_line_is_answered_into_a_pipe(file, capsys):
  flags = [f'--init_from={file}', '--tokenizer=tiny', '--template=short', '--temperature=0', '--max_think=3',
           '--max_new=21', '--question=3+4=?']
  assert chat.main(flags) == 0
  first = capsys.readouterr()
  assert len(first.out) > 5 and first.out.endswith('\n') and 'is cut' in first.err
  assert chat.main(flags) == 0 and capsys.readouterr().out == first.out


@pytest.mark.parametrize('flags, words', [
  (['--init_from=/no/such'], "'/no/such': cannot be read"),
  (['--init_from=FILE'], 'the file does not say which tokenizer it has: give --tokenizer'),
  (['--init_from=FILE', '--tokenizer=tiny', '--template=chat'], 'is no chat template'),
  (['--temperature=-1'], '--temperature=-1 --top_p=0.95: a temperature is 0'),
  (['--max_think=900', '--max_new=200'], 'together with a question of 64 tokens more than the model reads (1024)'),
  (['--max_new=0'], '--max_new=0 --max_think=256: an answer has 1 token or more')])
def test_bad_input_is_refused_before_any_weight_is_read(flags, words, file, capsys, monkeypatch):
  monkeypatch.setattr(chat, 'load_model', None)
  assert chat.main([flag.replace('FILE', str(file)) for flag in flags]) == 2
  assert words in capsys.readouterr().err


def test_a_question_without_room_is_refused_and_the_conversation_goes_on(capsys):
  out = io.StringIO()
  script = Script('12', room=20, max_length=40)
  conversation, questions = chat.Chat(script, TOKENIZER, 'short', 9, 9), iter(['x' * 40, '1+1=?'])
  chat.converse(conversation, chat.Screen(out, out, False), lambda: next_or_end(questions))
  assert out.getvalue() == '12\n' and 'error: the question has 42 tokens' in capsys.readouterr().err


def next_or_end(questions) -> str:
  for question in questions:
    return question
  raise EOFError
